"""LightningCLI, loggers, progress bars and the other namespace."""

import pytest
import torch
from lightning.pytorch.callbacks import RichModelSummary, RichProgressBar
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger

from hawq_lightning.callbacks import HAWQ
from tests.trainers import Classifier, assert_mixed, hawq, loader, trainer


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


YAML = """
seed_everything: 0
trainer:
  default_root_dir: .
  max_epochs: 1
  accelerator: cpu
  devices: 1
  logger: false
  enable_checkpointing: false
  enable_progress_bar: false
  enable_model_summary: false
  callbacks:
    - class_path: hawq_lightning.HAWQ
      init_args:
        weight_bits: [2, 4, 8]
        activation_bits: 8
        budget: {weights: 9x, bops: 60%}
        quantizer: {exclude: ["net.0"]}
        measure: {images: 32, rtol: 0.5}
        select: {constraints: {min_bits: 2}}
        progress: false
model:
  width: 16
data:
  class_path: tests.trainer.test_settings.Module
"""


@pytest.mark.feature("Command line", "LightningCLI builds the callback from YAML", "works")
@pytest.mark.filterwarnings("ignore:HAWQ. Much of the network stays float")
def test_lightning_cli(tmp_path, monkeypatch):
    pytest.importorskip("jsonargparse")
    from lightning.pytorch import LightningDataModule
    from lightning.pytorch.cli import LightningCLI

    (tmp_path / "run.yaml").write_text(YAML)
    monkeypatch.chdir(tmp_path)
    args = ["fit", "--config", "run.yaml", "--trainer.max_epochs", "2"]
    cli = LightningCLI(Classifier, LightningDataModule, subclass_mode_data=True, args=args)
    callback = next(c for c in cli.trainer.callbacks if isinstance(c, HAWQ))
    assert callback.measure_callback.select.budget == {
        "weights": "9x",
        "bops": "60%",
    } and callback.measure_callback.quantizer.weight_bits == (2, 4, 8)
    assert cli.trainer.current_epoch == 2
    assert_mixed(cli.model, callback)
    assert not any(s.name.startswith("net.0") for s in callback.plan.sites)
    assert "hawq_lightning.HAWQ" in (tmp_path / "config.yaml").read_text()  # what LightningCLI keeps of a run


@pytest.mark.feature("Loggers", "W&B, offline", "works; traces and bits of every site are logged")
def test_wandb_offline(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    logger = WandbLogger(save_dir=tmp_path, project="hawq", offline=True)
    model, callback = Classifier(), hawq(dirpath=tmp_path)
    trainer(tmp_path, callback, logger=logger, log_every_n_steps=1).fit(model, loader())
    assert_mixed(model, callback)
    bits = callback.plan["net.0.weight"].bits
    assert logger.experiment.summary["hawq/bits/net.0.weight"] == bits
    wandb.finish()
    assert list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))


@pytest.mark.feature("Loggers", "TensorBoard", "works; traces and bits of every site are logged")
def test_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = TensorBoardLogger(tmp_path, name="", version="")
    model, callback = Classifier(), hawq()
    trainer(tmp_path, callback, logger=logger).fit(model, loader())
    assert_mixed(model, callback)
    logger.finalize("success")
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert events.Scalars("hawq/bits/net.0.weight")[0].value == callback.plan["net.0.weight"].bits


@pytest.mark.feature("Other callbacks", "RichProgressBar, RichModelSummary", "works")
@pytest.mark.parametrize("first", [True, False], ids=["hawq_first", "hawq_last"])
def test_rich(tmp_path, first, capsys):
    model, callback = Classifier(), hawq(progress=True)
    others = [RichProgressBar(), RichModelSummary()]
    callbacks = [callback, *others] if first else [*others, callback]
    t = trainer(tmp_path, *callbacks, enable_progress_bar=True, enable_model_summary=True)
    t.fit(model, loader(), loader(shuffle=False))
    assert_mixed(model, callback)
    assert "QLinear" not in capsys.readouterr().err
