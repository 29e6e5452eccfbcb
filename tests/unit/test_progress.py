"""Bars are for people who asked for one, and leave nothing behind."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from hawq_lightning import candidates, measure, sites
from tests.console import python

BATCHES = [(torch.randn(6, 4), torch.randint(0, 3, (6,))) for _ in range(2)]


def loss_fn(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return cross_entropy(model(batch[0]), batch[1])


def run(progress: bool) -> list[float]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))
    table = sites(model, BATCHES[0])
    sensitivity = measure(model, BATCHES, loss_fn, sites=table, progress=progress)
    table = candidates(model, BATCHES, sensitivity, table, loss_fn, progress=progress)
    return [c.omega for group in table.values() for c in group]


def test_without_progress_nothing_is_written(capfd):
    run(progress=False)
    assert capfd.readouterr() == ("", "")


def test_a_bar_changes_no_number():
    assert run(progress=True) == run(progress=False)


def test_a_bar_names_what_runs():
    code = "from tests.unit.test_progress import run; run(progress=True)"
    terminal = {"TTY_COMPATIBLE": "1", "FORCE_COLOR": "1", "COLUMNS": "100"}
    code, out, err = python(code, cwd=Path(__file__).parents[2], **terminal)
    assert code == 0, err
    assert all(what in out for what in ("Hessian traces", "Weight ranges", "Activation perturbations", "2/2"))
