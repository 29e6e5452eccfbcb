"""Batches for which training_step returns None are left out of the measurement, as Lightning leaves them out."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from hawq_lightning import HawqError, MeasureConfig, PostTraining
from tests.internals import internal
from tests.trainers import CLASSES, FEATURES, Classifier, assert_mixed, hawq, trainer

BATCH, BATCHES = 8, 8
pytestmark = pytest.mark.filterwarnings("ignore:.*returned `None`")  # Lightning says it once a process


def data(skipped):
    """Batches of which those of these numbers have no label but -1."""
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(BATCH * BATCHES, FEATURES, generator=g), torch.arange(BATCH * BATCHES) % CLASSES
    for number in skipped:
        y[number * BATCH : (number + 1) * BATCH] = -1
    return DataLoader(TensorDataset(x, y), BATCH)


class Skips(Classifier):
    """Returns None where nothing is labelled; the others' losses are those of a plain classifier."""

    def training_step(self, batch, batch_idx):
        if (batch[1] < 0).all():
            return None
        return F.cross_entropy(self(batch[0]), batch[1], ignore_index=-1)

    def validation_step(self, batch, batch_idx):
        pass


class SkipsInADict(Skips):
    def training_step(self, batch, batch_idx):
        return {"loss": super().training_step(batch, batch_idx)}


def lines_of(monkeypatch):
    lines = []
    monkeypatch.setattr(internal("callbacks._trainer._skipped"), "rank_zero_info", lines.append)
    return lines


@pytest.mark.parametrize("skipped", [(0,), (2,), (7,), (0, 1, 2, 5)])
def test_skipped_batches_are_left_out(tmp_path, monkeypatch, skipped):
    lines, traces = lines_of(monkeypatch), []
    whole = data(skipped).dataset
    rest = TensorDataset(*(t[whole.tensors[1] >= 0] for t in whole.tensors))
    for name, loader in (("skipping", data(skipped)), ("without them", DataLoader(rest, BATCH))):
        torch.manual_seed(0)
        model, callback = Skips(), hawq(images=BATCH * BATCHES)
        trainer(tmp_path / name, callback).fit(model, loader)
        assert_mixed(model, callback)
        traces.append({r.name: r.trace for r in callback.sensitivity})
    assert traces[0] == traces[1]
    assert any(f"{len(skipped)} of {BATCHES} batches" in line for line in lines)


def test_images_are_drawn_until_some_have_a_loss(tmp_path):
    model, callback = Skips(), hawq(images=BATCH, start_epoch=1)
    trainer(tmp_path, callback, max_epochs=2).fit(model, data((0, 1, 2)))
    assert_mixed(model, callback)


@pytest.mark.parametrize("held_out", ["train", "validation"])
def test_plans_are_judged_on_batches_that_have_a_loss(tmp_path, held_out):
    model = Skips()
    callback = hawq(measure=MeasureConfig(images=4 * BATCH, rtol=0.5, loss_per_site=True))
    improving = PostTraining(methods=["bias_correction"])
    validation = data((0, 4)) if held_out == "validation" else None
    trainer(tmp_path, callback, improving).fit(model, data((1, 5)), validation)
    assert callback.measure_callback.loss_per_site


def test_where_all_are_skipped_the_error_says_so(tmp_path):
    for kind in (Skips, SkipsInADict):
        with pytest.raises(HawqError, match=rf"Of {BATCHES} train batches none has a loss: {kind.__name__}\..*loss_fn"):
            trainer(tmp_path, hawq()).fit(kind(), data(range(BATCHES)))
