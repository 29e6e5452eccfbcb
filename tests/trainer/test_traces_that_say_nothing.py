"""Networks whose traces are negative or drown in noise, and a single measured batch: the budget holds all the same."""

from __future__ import annotations

import itertools
import math
import warnings

import pytest
import torch
from lightning.pytorch import seed_everything
from torch import nn
from torch.nn import functional as F

from tests.trainers import CLASSES, Classifier, assert_mixed, hawq, loader, trainer


class SimCLR(Classifier):
    """A contrastive step: every image's loss has all the others in it."""

    def training_step(self, batch, batch_idx):
        a, b = (F.normalize(self.net(batch[0] + 0.1 * torch.randn_like(batch[0])), dim=1) for _ in range(2))
        return F.cross_entropy(a @ b.T / 0.5, torch.arange(len(a)))


class SimSiam(Classifier):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(CLASSES, CLASSES)

    def training_step(self, batch, batch_idx):
        a, b = (self.net(batch[0] + 0.1 * torch.randn_like(batch[0])) for _ in range(2))
        return -sum(F.cosine_similarity(self.head(x), y.detach()).mean() for x, y in ((a, b), (b, a))) / 2


class Dice(Classifier):
    """Over the batch, less what it is at its best: concave."""

    sign = 1.0

    def training_step(self, batch, batch_idx):
        p, t = self(batch[0]).softmax(1), F.one_hot(batch[1], CLASSES)
        return self.sign * (1 - (2 * (p * t).sum(0) / (p.sum(0) + t.sum(0))).mean())


class Upwards(Dice):
    sign = -1.0


class Concave(Classifier):
    def training_step(self, batch, batch_idx):
        return -self(batch[0]).square().mean()


def quantized(tmp_path, make, batch_size, budget):
    seed_everything(1, verbose=False)
    net, callback = make(), hawq(images=32, budget=budget)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        trainer(tmp_path, callback).fit(net, loader(batch_size))
    assert_mixed(net, callback)
    return callback, [str(w.message) for w in told]


def best(callback, budget):
    """Every choice of widths: the least perturbation within the budget."""
    weights = callback.plan.weights
    room = sum(s.numel for s in weights) * 32 / budget
    fits = [
        sum(c.perturbation for c in choice)
        for choice in itertools.product(*(callback.candidates[s.name] for s in weights))
        if sum(s.numel * c.bits for s, c in zip(weights, choice, strict=True)) <= room
    ]
    return min(fits)


@pytest.mark.feature(
    "Modules",
    "traces that are all negative or insignificant: untrained contrastive networks, concave losses",
    "the loudest warning; bits by the size of their errors, the best that the budget allows",
)
@pytest.mark.parametrize("make", [SimCLR, SimSiam, Upwards, Concave])
@pytest.mark.parametrize(("batch_size", "budget"), [(16, 9), (64, 11.5)])
def test_a_network_whose_traces_say_nothing_gets_the_best_plan_of_the_budget(tmp_path, make, batch_size, budget):
    callback, told = quantized(tmp_path, make, batch_size, f"{budget}x")
    assert all(r.trace < 2 * r.stderr for r in callback.sensitivity if r.kind == "weight")
    loud = [text for text in told if "say nothing: none is significantly positive" in text]
    assert any("weight traces" in text for text in loud)
    plan = callback.plan
    assert plan.costs["weight_bytes"] <= plan.costs["float_weight_bytes"] / budget
    found = math.fsum(s.perturbation for s in plan.weights)
    assert found == pytest.approx(best(callback, budget), rel=1e-9)
    ratios = [s.omega / s.perturbation for s in plan.weights]
    assert ratios == pytest.approx([ratios[0]] * len(ratios)) and ratios[0] > 0  # one mean trace for all


@pytest.mark.feature(
    "Data",
    "one measured batch, of at least `images` images, whose loss cannot be told apart by image",
    "a plan of the budget; the error by the choice of images is unknown, and said to be",
)
@pytest.mark.parametrize("make", [SimCLR, Dice, Upwards])
def test_one_measured_batch_is_enough_for_a_plan(tmp_path, make):
    callback, told = quantized(tmp_path, make, 64, "9x")
    measured = [r for r in callback.sensitivity if r.kind == "weight"]
    assert all(math.isfinite(r.stderr) and r.stderr_data == math.inf for r in measured)
    assert callback.plan.costs["weight_bytes"] <= callback.plan.costs["float_weight_bytes"] / 9
    assert any("one batch" in note for note in callback.sensitivity.notes), callback.sensitivity.notes
    assert not any("device" in text for text in told)
