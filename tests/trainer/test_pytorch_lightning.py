"""Programs written with ``import pytorch_lightning``, whose classes are not those of lightning.pytorch."""

from __future__ import annotations

import warnings

import lightning.pytorch
import pytest
import torch
from lightning.fabric import Fabric
from packaging.version import Version
from torch import nn
from torch.nn import functional as F

from hawq_lightning import HAWQ, ApplyPlan, Distillation, HawqError, MeasureTraces, load_from_checkpoint
from hawq_lightning.quantization import enabled_bits
from tests.trainers import assert_mixed, loader, mlp

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    other = pytest.importorskip("pytorch_lightning")
    from hawq_lightning import pytorch_lightning as ours

NAMES = {"lightning.pytorch": lightning.pytorch, "pytorch_lightning": other}
takes_the_other_name = pytest.mark.skipif(
    Version(lightning.__version__) < Version("2.6"),
    reason="Lightning 2.5's Trainer refuses callbacks of the other name",
)


def task(pl, manual=False, builds_later=False):
    """The same LightningModule under either name."""

    class Task(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = not manual
            if not builds_later:
                self.net = mlp()

        def configure_model(self):
            if not hasattr(self, "net"):
                self.net = mlp()

        def training_step(self, batch, batch_idx):
            loss = F.cross_entropy(self.net(batch[0]), batch[1])
            self.log("train_loss", loss)
            if not manual:
                return loss
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()

        def validation_step(self, batch, batch_idx):
            self.log("val_loss", F.cross_entropy(self.net(batch[0]), batch[1]))

        def on_after_batch_transfer(self, batch, dataloader_idx):
            return 2 * batch[0], batch[1]

        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), 0.05)
            plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": plateau, "monitor": "val_loss"}}

    if builds_later:
        return Task
    if not manual:
        del Task.configure_model
    return Task


def callback(kind=HAWQ, **more):
    return kind(weight_bits=(2, 4, 8), activation_bits=8, budget="6x", progress=False, **more)


def fit(pl, folder, module, callbacks, epochs=2, ckpt_path=None, **more):
    settings = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu",
                "default_root_dir": folder, "max_epochs": epochs, "log_every_n_steps": 1} | more  # fmt: skip
    torch.manual_seed(3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the other name's own advice
        trainer = pl.Trainer(callbacks=callbacks, **settings)
        trainer.fit(module, loader(shuffle=False), loader(shuffle=False), ckpt_path=ckpt_path)
    return trainer


@takes_the_other_name
@pytest.mark.feature("Modules", "the namespace `pytorch_lightning`", "works: HAWQ in its Trainer's list of callbacks")
@pytest.mark.parametrize(
    "kind",
    [
        "manual",
        "one callback",
        *(pytest.param(k, marks=pytest.mark.stress) for k in ("plain", "builds later", "distillation")),
    ],
)
def test_the_same_plan_and_weights_under_both_names(tmp_path, kind):
    found = {}
    for name, pl in NAMES.items():
        torch.manual_seed(0)
        module = task(pl, manual=kind == "manual", builds_later=kind == "builds later")()
        hawq = callback(ours.HAWQ if kind == "one callback" and pl is other else HAWQ)
        callbacks = [pl.callbacks.EarlyStopping("val_loss"), hawq]
        if kind == "distillation":
            callbacks.append(Distillation())
        fit(pl, tmp_path / name, module, hawq if kind == "one callback" else callbacks, enable_checkpointing=False)
        assert_mixed(module, hawq)
        found[name] = hawq.plan.bits, [s.trace for s in hawq.sensitivity], module.state_dict()
    one, two = found.values()
    assert one[:2] == two[:2]
    assert one[2].keys() == two[2].keys() and all(torch.equal(one[2][k], two[2][k]) for k in one[2])


@takes_the_other_name
def test_a_run_goes_on_and_checkpoints_load(tmp_path):
    kind = task(other)
    torch.manual_seed(0)
    whole, first = kind(), callback()
    saver = other.callbacks.ModelCheckpoint(tmp_path, save_last=True, save_top_k=-1, filename="{epoch}")
    fit(other, tmp_path, whole, [first, saver], epochs=3)
    torch.manual_seed(0)
    again, second = kind(), callback()
    fit(other, tmp_path / "again", again, [second], epochs=3, ckpt_path=tmp_path / "epoch=1.ckpt")
    assert second.plan.bits == first.plan.bits
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), again.state_dict().values()))
    loaded = load_from_checkpoint(kind, tmp_path / "last.ckpt")
    assert enabled_bits(loaded) == enabled_bits(whole)
    x = torch.randn(5, 12)
    assert torch.equal(loaded.eval().net(x), whole.eval().net(x))


@takes_the_other_name
def test_averages_and_scores_of_its_callbacks(tmp_path):
    torch.manual_seed(0)
    module, hawq = task(other)(), callback(start_epoch=1)
    stopper = other.callbacks.EarlyStopping("val_loss", patience=5)
    saver = other.callbacks.ModelCheckpoint(tmp_path, monitor="val_loss")
    swa = other.callbacks.StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=2)
    seen = []

    class Watch(other.Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            seen.append((float(stopper.best_score), saver.best_model_path))

    fit(other, tmp_path, module, [swa, hawq, stopper, saver, Watch()], epochs=4)
    assert seen[1] == (float("inf"), "")  # forgotten when the network became another one
    assert enabled_bits(module)


class Spawned(other.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 4))

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.05)


@pytest.mark.stress
@pytest.mark.parametrize("kind", [HAWQ, ours.HAWQ])
def test_two_processes(tmp_path, kind):
    torch.manual_seed(0)
    alone, one = Spawned(), callback()
    fit(other, tmp_path / "one", alone, [one], enable_checkpointing=False)
    torch.manual_seed(0)
    module, two = Spawned(), callback(kind)
    more = {"strategy": "ddp_spawn", "devices": 2, "enable_checkpointing": False}
    fit(other, tmp_path / "two", module, [two], **more)
    assert two.plan.bits == one.plan.bits


def test_what_is_no_trainer_of_lightning_is_refused():
    with pytest.raises(HawqError, match=r"Lightning's Trainer, and this is a Fabric of lightning\.fabric"):
        MeasureTraces().analyze(Fabric(accelerator="cpu"), Spawned())
    with pytest.raises(HawqError, match="Lightning's Trainer"):
        ApplyPlan().setup(object(), Spawned(), "fit")
