"""Selectors that read no traces: nothing is sent back through the network before training."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from hawq_lightning import HawqError
from hawq_lightning.quantization import enabled_bits
from tests.trainers import Classifier, hawq, loader, trainer

PLANS = {
    "uniform": {"budget": "8x"}, "direct": {"budget": "6x"}, "l2": {"budget": "8x"}, "random": {"budget": "8x"},
    "manual": {"budget": "4x", "bits": {"*.weight": 4, "*.input": 8}},
}  # fmt: skip


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Backward passes that autograd's engine has run so far."""
    counted: list[int] = []
    run = torch.autograd.graph._engine_run_backward

    def count(*args: object, **kwargs: object) -> object:
        counted.append(1)
        return run(*args, **kwargs)  # type: ignore[arg-type]

    for module in (torch.autograd, torch.autograd.graph):
        monkeypatch.setattr(module, "_engine_run_backward", count)
    yield counted


def fitted(folder: Path, selector: str, **settings: object) -> tuple[object, Classifier]:
    torch.manual_seed(0)
    model, callback = Classifier(), hawq(selector=selector, dirpath=folder, **settings)
    trainer(folder, callback, max_epochs=1, limit_train_batches=2, limit_val_batches=0).fit(model, loader())
    return callback, model


@pytest.mark.parametrize("selector", PLANS)
def test_only_training_goes_backwards(selector: str, tmp_path: Path, passes: list[int]) -> None:
    callback, model = fitted(tmp_path, selector, **PLANS[selector])
    assert len(passes) == 2, "two training steps"
    assert enabled_bits(model) == callback.plan.bits and len(set(callback.plan.bits.values())) > 0
    assert all(s.omega is None and s.trace is None for s in callback.plan.sites)
    assert {*Path(tmp_path).glob("*.json")} == {tmp_path / "plan.json"}
    with pytest.raises(HawqError, match="reads none"):
        _ = callback.sensitivity


def test_others_measure_as_before(tmp_path: Path, passes: list[int]) -> None:
    callback, _ = fitted(tmp_path, "pareto", budget="8x")
    assert len(passes) > 2 and callback.has_sensitivity
