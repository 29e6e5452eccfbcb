"""The loss as training_step makes it: which are measured, which ask for loss_fn, in one sentence."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from hawq_lightning import HawqError
from hawq_lightning.quantization import enabled_bits
from tests.internals import internal
from tests.trainers import (
    CLASSES,
    Classifier,
    assert_mixed,
    fit,
    hawq,
    loader,
    trainer,
)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)


def smoothed(module, x, y):
    return F.cross_entropy(module(x), y, label_smoothing=0.1)


def weighted(module, x, y):
    return F.cross_entropy(module(x), y, torch.tensor([1.0, 2.0, 0.5, 3.0]))


def ignoring(module, x, y):
    y = torch.where(torch.arange(len(y)) % 3 == 0, torch.full_like(y, 255), y)
    return F.cross_entropy(module(x), y, ignore_index=255)


def dice(module, x, y):
    p, t = module(x).softmax(1), F.one_hot(y, CLASSES)
    return 1 - (2 * (p * t).sum() / (p.sum() + t.sum()))


def elementwise(module, x, y):
    return F.binary_cross_entropy_with_logits(module(x), F.one_hot(y, CLASSES).float())


def squared(module, x, y):
    return F.mse_loss(module(x), F.one_hot(y, CLASSES).float())


@pytest.mark.feature("Modules", "label smoothing, class weights, ignore_index, dice, BCE, MSE", "works")
@pytest.mark.parametrize("loss", [smoothed, weighted, ignoring, dice, elementwise, squared])
def test_losses(tmp_path, loss):
    class Mine(Classifier):
        def training_step(self, batch, batch_idx):
            return {"loss": loss(self, *batch), "extra": None}

    callback = fit(tmp_path, Mine(), loader(), images=64, rtol=0.8)
    coupled = loss is dice  # the others' normaliser is one number a batch: images stay apart in the Hessian
    assert {*callback.sensitivity.row_unit.values()} == ({"batch"} if coupled else {"image"})


class Segmenter(LightningModule):
    """As torchvision's reference: two heads, ignore_index, auxiliary loss in training mode only."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1)
        self.body = nn.Conv2d(4, 6, 3, padding=1)
        self.head, self.aux = nn.Conv2d(6, 3, 1), nn.Conv2d(4, 3, 1)

    def forward(self, x):
        low = self.stem(x).relu()
        out = {"out": self.head(self.body(low).relu())}
        return out | ({"aux": self.aux(low)} if self.training else {})

    def training_step(self, batch):
        out = self(batch["image"])
        losses = {k: F.cross_entropy(v, batch["mask"], ignore_index=255) for k, v in out.items()}
        return losses["out"] + 0.5 * losses["aux"]

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


@pytest.mark.feature("Modules", "a segmentation network with an auxiliary head in training mode", "works")
def test_segmentation_with_an_auxiliary_head(tmp_path):
    masks = torch.randint(0, 3, (24, 6, 6))
    masks[:, 0] = 255
    rows = [{"image": torch.randn(1, 6, 6), "mask": m} for m in masks]
    callback = fit(tmp_path, Segmenter(), DataLoader(rows, 8), rtol=1.0)
    assert {s.layers[0] for s in callback.plan.weights} == {"stem", "body", "head", "aux"}


class ReturnsNothing(Classifier):
    def training_step(self, batch, batch_idx):
        return None


class ReturnsText(Classifier):
    def training_step(self, batch, batch_idx):
        return "loss"


class Iterates(Classifier):
    def training_step(self, dataloader_iter):
        return self.loss(next(dataloader_iter)[0])


class NeedsEarlierHook(Classifier):
    def on_train_start(self):
        self.weighting = torch.ones(CLASSES)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1], self.weighting)


@pytest.mark.parametrize("kind", [ReturnsNothing, ReturnsText, Iterates, NeedsEarlierHook])
def test_steps_that_cannot_be_borrowed_ask_for_loss_fn(tmp_path, kind):
    model = kind()
    with pytest.raises(HawqError, match=rf"{kind.__name__}\.training_step.*loss_fn"):
        trainer(tmp_path, hawq()).fit(model, loader())
    assert not enabled_bits(model)
    assert "log" not in model.__dict__ and model._current_fx_name in (None, "on_fit_start")


class Misspells(Classifier):
    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1], self.waiting)


class MisreadsItsBatch(Classifier):
    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch.images), batch.labels)


@pytest.mark.parametrize(("kind", "missing"), [(Misspells, "waiting"), (MisreadsItsBatch, "images")])
def test_a_mistake_in_training_step_stays_its_own_error(tmp_path, kind, missing):
    with pytest.raises(AttributeError, match=missing) as raised:
        trainer(tmp_path, hawq()).fit(kind(), loader())
    assert any("loss_fn" in note for note in raised.value.__notes__)


class SetsOnAPart(Classifier):
    def on_train_epoch_start(self):
        self.net.weighting = torch.ones(CLASSES)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1], self.net.weighting)


class ReadsTheLoader(Classifier):
    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1]) + self.trainer.train_dataloader.dataset.tensors[0].sum()


def test_what_later_hooks_make_is_told_from_mistakes(tmp_path):
    with pytest.raises(HawqError, match=r"SetsOnAPart\.training_step reads what is not there.*loss_fn"):
        trainer(tmp_path, hawq()).fit(SetsOnAPart(), loader())


def test_a_step_may_read_the_trainers_loader(tmp_path):
    model, callback = ReadsTheLoader(), hawq()
    trainer(tmp_path, callback).fit(model, loader())
    assert_mixed(model, callback)


def test_a_line_is_logged_before_measuring_starts_and_none_when_it_does_not(tmp_path, monkeypatch):
    lines = []
    monkeypatch.setattr(internal("callbacks._shared"), "rank_zero_info", lines.append)

    class Counts(Classifier):
        losses = 0

        def training_step(self, batch, batch_idx):
            Counts.losses += 1
            lines.append(Counts.losses)
            return super().training_step(batch, batch_idx)

    torch.manual_seed(0)
    fit(tmp_path, Counts(), loader(), images=64)
    (line,) = [n for n in lines if isinstance(n, str)]
    assert "measures the Hessian traces of" in line and "on 64 images" in line
    assert lines.index(line) < Counts.losses / 2
    lines.clear()
    torch.manual_seed(0)
    fit(tmp_path, Counts(), loader(), images=64)
    assert not any(isinstance(n, str) and "measures the" in n for n in lines)


@pytest.mark.feature(
    "Modules",
    "`training_step(dataloader_iter)`, or one that needs a later hook",
    "one sentence asks for `MeasureConfig(loss_fn=...)`, which works",
)
@pytest.mark.parametrize("kind", [Iterates, NeedsEarlierHook])
def test_loss_fn_is_the_way_out(tmp_path, kind):
    fit(tmp_path, kind(), loader(), loss_fn=lambda module, batch: Classifier.loss(module, batch))


def test_a_head_for_objects_may_get_none(tmp_path):
    class Masked(Classifier):
        def __init__(self):
            super().__init__()
            self.mask = nn.Linear(4, 4)

        def training_step(self, batch, batch_idx):
            scores = self.net(batch[0])
            masks = self.mask(scores[batch[1] == 3])  # of some batches of 4 images none
            return scores.square().mean() + 0.01 * masks.square().sum()

    model = Masked()
    trainer(tmp_path, hawq(budget="5x", images=64)).fit(model, loader(batch_size=4))
    assert enabled_bits(model)["mask.weight"]
