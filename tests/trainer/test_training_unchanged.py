"""Measuring changes nothing in training: losses, metrics, counters, random states."""

from __future__ import annotations

import csv
import random

import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.nn import functional as F
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassAUROC

from tests.trainers import CLASSES, Classifier, assert_mixed, hawq, loader, measuring, same_states, trainer


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)


class Observed(Classifier):
    """Logs, updates metrics, keeps lists and counters, draws random numbers, runs buffers: all in training_step."""

    def __init__(self):
        super().__init__()
        self.acc = MulticlassAccuracy(CLASSES)
        self.many = MetricCollection({"top2": MulticlassAccuracy(CLASSES, top_k=2), "auroc": MulticlassAUROC(CLASSES)})
        self.mean = MeanMetric()
        self.register_buffer("steps", torch.zeros(()))
        self.seen, self.count, self.draws, self.nested = [], 0, [], {"batches": []}
        self.net[0].requires_grad_(False)
        self.net[0].eval()

    def training_step(self, batch, batch_idx):
        x, y = batch
        logits = self(x + 0.01 * torch.randn_like(x))
        loss = F.cross_entropy(logits, y)
        self.acc(logits, y)
        self.many.update(logits.softmax(1), y)
        self.mean.update(loss)
        self.steps += 1
        self.count += 1
        self.seen.append(float(loss.detach()))
        self.nested["batches"].append(batch_idx)
        self.draws.append((random.random(), float(np.random.rand()), self.training, self.net[1].training))
        self.log("acc", self.acc, on_step=True, on_epoch=True)
        self.log_dict({"loss": loss, "count": float(self.count)}, prog_bar=True)
        self.log("mean", self.mean, on_epoch=True, on_step=False)
        return {"loss": loss, "logits": logits.detach()}

    def on_train_epoch_end(self):
        self.log_dict(self.many.compute())
        self.many.reset()


def run_observed(folder, *callbacks, **kwargs):
    torch.manual_seed(3)
    np.random.seed(3)
    random.seed(3)
    model = Observed()
    logger = CSVLogger(folder, name="", version="")
    t = trainer(folder, *callbacks, max_epochs=2, logger=logger, log_every_n_steps=1, num_sanity_val_steps=1, **kwargs)
    t.fit(model, loader(), loader(shuffle=False))
    with (folder / "metrics.csv").open() as file:
        rows = [{k: v for k, v in row.items() if v and not k.startswith("hawq/")} for row in csv.DictReader(file)]
    rows = [r for r in rows if set(r) - {"step", "epoch"}]
    return model, rows, {k: v.item() for k, v in t.callback_metrics.items()}


def test_measuring_leaves_training_bitwise_alone(tmp_path):
    measure_callback = measuring()
    alone, rows, metrics = run_observed(tmp_path / "alone")
    beside, rows2, metrics2 = run_observed(tmp_path / "beside", measure_callback)
    assert measure_callback.plan is not None and len({s.bits for s in measure_callback.plan.weights}) >= 2
    assert rows == rows2 and len(rows) > 8
    assert metrics == metrics2
    assert same_states(alone.state_dict(), beside.state_dict())
    for name in ("seen", "count", "draws", "nested"):
        assert getattr(alone, name) == getattr(beside, name)
    assert [m.training for m in alone.modules()] == [m.training for m in beside.modules()]
    assert [p.requires_grad for p in alone.parameters()] == [p.requires_grad for p in beside.parameters()]
    assert type(beside.net[0]) is nn.Linear  # this callback changes no layer


@pytest.mark.feature(
    "Modules", "metrics, counters, lists and random draws in `training_step`", "left as they were by the measurement"
)
def test_hawq_also_leaves_random_states_and_counters_alone(tmp_path):
    callback = hawq()
    alone, _, _ = run_observed(tmp_path / "alone")
    beside, _, _ = run_observed(tmp_path / "beside", callback)
    assert_mixed(beside, callback)
    assert alone.draws == beside.draws and alone.count == beside.count and len(beside.seen) == 8
    assert torch.equal(alone.steps, beside.steps)
    assert "log" not in beside.__dict__ and "manual_backward" not in beside.__dict__
