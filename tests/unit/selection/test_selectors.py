"""Selectors that need more than traces, through the callback: eigenvalues, and the measured loss of plans."""

from __future__ import annotations

import lightning.pytorch as pl
import pytest
import torch

from hawq_lightning import HAWQ, HawqError, MeasureConfig, SelectConfig, quantize
from hawq_lightning.data import DigitsDataModule
from hawq_lightning.models import resnet20
from hawq_lightning.quantization import loss_of_plan
from hawq_lightning.tasks import ClassificationTask


def fit(folder, selector, budget="8x", **kwargs):
    pl.seed_everything(0, verbose=False)
    task = ClassificationTask(resnet20(num_classes=10, in_channels=1, channels=4), num_classes=10, lr=1e-12)
    hawq = HAWQ(
        (2, 4, 8), 8, measure=MeasureConfig(images=32), select=SelectConfig(budget, selector, **kwargs), dirpath=folder,
        progress=False,
    )  # fmt: skip
    trainer = pl.Trainer(
        max_epochs=1, limit_train_batches=1, limit_val_batches=0, callbacks=[hawq], logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(task, DigitsDataModule())
    return hawq, task


@pytest.mark.parametrize("selector", ["top_eigenvalue", "hawq"])
def test_eigenvalues_reach_the_selector(tmp_path, selector):
    hawq, _ = fit(tmp_path, selector)
    assert hawq.plan.selector == selector
    found = hawq.plan.settings["eigenvalues"]
    assert set(found) == {s.name for s in hawq.plan.weights}
    assert all(v > 0 for v in found.values())
    for s in hawq.sensitivity:
        if s.kind == "weight":  # no eigenvalue exceeds the trace of a positive semidefinite block
            assert found[s.name] <= 1.1 * s.trace
    assert hawq.plan.costs["w_comp"] >= 8
    assert not (tmp_path / "sensitivity.partial").exists()


def test_accuracy_measures_plans(tmp_path):
    hawq, _ = fit(tmp_path, "accuracy")
    assert hawq.plan.settings["measurements"] == 1 + 2 * len(hawq.plan.weights)
    assert hawq.plan.costs["w_comp"] >= 8


def test_bits_by_hand(tmp_path):
    hawq, _ = fit(tmp_path, "manual", bits={"*.weight": 4, "net.conv1.weight": 8}, budget=None)
    weights = {s.name: s.bits for s in hawq.plan.weights}
    assert weights.pop("net.conv1.weight") == 8 and set(weights.values()) == {4}
    assert hawq.plan.selector == "manual"
    with pytest.raises(HawqError, match="needs bits"):
        fit(tmp_path / "none", "manual")


def test_the_worst_plan_of_a_size_is_worse(tmp_path):
    (best, _), (worst, _) = fit(tmp_path / "a", "pareto"), fit(tmp_path / "b", "max_perturbation")
    assert worst.plan.omega > best.plan.omega
    assert worst.plan.costs["weight_bytes"] <= 1.03 * best.plan.costs["weight_bytes"]


def test_the_loss_of_a_plan_is_that_of_the_quantized_network(tmp_path):
    hawq, task = fit(tmp_path, "pareto")
    plan = hawq.plan
    g = torch.Generator().manual_seed(0)
    batches = [(torch.randn(n, 1, 8, 8, generator=g), torch.arange(n) % 10) for n in (6, 4)]
    loss_fn = lambda m, b: torch.nn.functional.cross_entropy(m(b[0]), b[1])  # noqa: E731
    task.eval()
    with torch.no_grad():
        expected = sum(float(loss_fn(task, b)) * len(b[1]) for b in batches) / 10
    fresh = ClassificationTask(resnet20(num_classes=10, in_channels=1, channels=4), num_classes=10, lr=1e-12).eval()
    fresh.load_state_dict({k: v for k, v in task.state_dict().items() if "quantizer" not in k})
    before = {k: v.clone() for k, v in fresh.state_dict().items()}
    with torch.no_grad():
        float_loss = sum(float(loss_fn(fresh, b)) * len(b[1]) for b in batches) / 10
    with loss_of_plan(fresh, batches, loss_fn) as loss_of:
        first = loss_of(plan)
        assert loss_of(plan) == first
    assert first == pytest.approx(expected, rel=1e-5)
    assert first != pytest.approx(float_loss, rel=1e-6)
    after = fresh.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[k], v) for k, v in before.items())
    quantize(fresh, plan)


def test_l1_is_checked(tmp_path):
    with pytest.raises(HawqError, match="Unknown l1_curvature 'fischer'.*'fisher'"):
        MeasureConfig(l1_curvature="fischer")
