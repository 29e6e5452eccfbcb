"""Lightning's other callbacks, listed before or after ours."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    EarlyStopping,
    LearningRateFinder,
    LearningRateMonitor,
    ModelCheckpoint,
    ModelPruning,
    ModelSummary,
)
from lightning.pytorch.loggers import CSVLogger

from hawq_lightning.quantization import enabled_bits
from tests.trainers import ORDERS, Classifier, assert_mixed, fit_beside, hawq, loader, trainer


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.mark.feature("Other callbacks", "ModelPruning, listed before or after", "works; pruned weights stay 0")
@ORDERS
def test_pruning(tmp_path, first):
    model, callback = Classifier(), hawq()
    pruning = ModelPruning("l1_unstructured", amount=0.3, parameter_names=["weight"], make_pruning_permanent=True,
                           parameters_to_prune=[(model.net[0], "weight"), (model.net[4], "weight")])  # fmt: skip
    fit_beside(tmp_path, model, callback, [pruning], first)
    assert (model.net[4].weight == 0).float().mean() > 0.25
    assert type(model.net[4].weight) is torch.nn.Parameter


@pytest.mark.feature(
    "Other callbacks", "LearningRateFinder, listed before or after", "works; it tries rates on the quantized network"
)
@ORDERS
def test_learning_rate_finder_sees_the_armed_network(tmp_path, first):
    seen = []

    class Tuned(Classifier):
        def __init__(self):
            super().__init__()
            self.lr = 0.02

        def training_step(self, batch, batch_idx):
            seen.append(bool(enabled_bits(self)))
            return super().training_step(batch, batch_idx)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=self.lr)

    model, callback = Tuned(), hawq()
    finder = LearningRateFinder(num_training_steps=20, early_stop_threshold=None)
    fit_beside(tmp_path, model, callback, [finder], first, max_epochs=8)  # the finder's steps count towards the epochs
    measured = seen.index(True)
    assert all(seen[measured:]) and len(seen) - measured >= 20 + 4  # its trial steps, then training
    assert finder.optimal_lr.suggestion() == model.lr != 0.02


@pytest.mark.feature("Other callbacks", "BatchSizeFinder, listed before or after", "works")
@ORDERS
def test_batch_size_finder(tmp_path, first):
    class Sized(Classifier):
        def __init__(self):
            super().__init__()
            self.batch_size = 4

        def train_dataloader(self):
            return loader(self.batch_size)

        def val_dataloader(self):
            return loader(shuffle=False)

    model, callback = Sized(), hawq()
    callbacks = [callback, BatchSizeFinder(steps_per_trial=2, max_trials=2)]
    trainer(tmp_path, *(callbacks if first else callbacks[::-1])).fit(model)
    assert_mixed(model, callback)


@pytest.mark.feature(
    "Other callbacks", "EarlyStopping, ModelCheckpoint, LearningRateMonitor, ModelSummary, CSVLogger", "works"
)
@ORDERS
def test_early_stopping_checkpointing_and_the_rest(tmp_path, first):
    model, callback = Classifier(), hawq()
    stop = EarlyStopping("val_loss", patience=1, mode="max")  # improving is bad: it stops
    saver = ModelCheckpoint(tmp_path, monitor="val_loss", save_top_k=2)
    logger = CSVLogger(tmp_path, name="", version="")
    others = [stop, saver, LearningRateMonitor(), ModelSummary(max_depth=2)]
    t = fit_beside(
        tmp_path, model, callback, others, first, max_epochs=8, logger=logger, enable_checkpointing=True,
        enable_model_summary=True, num_sanity_val_steps=1,
    )  # fmt: skip
    assert stop.stopped_epoch > 0 or t.current_epoch == 8
    assert t.validate(model, loader(shuffle=False), ckpt_path="best", verbose=False)
    assert_mixed(model, callback)
