"""A user's script under a type checker: what the public names give, and that wrong choices are seen before a run."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = """
from typing import assert_type

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.nn.functional import cross_entropy

from hawq_lightning import (
    HAWQ, Candidates, Frontier, MeasureConfig, Plan, Problem, QuantizerConfig, SelectConfig, Sensitivity, SiteTable,
    candidates, frontier, load_from_checkpoint, load_packed, measure, quantize, save_packed, select, sites, unquantize,
)

Batch = tuple[torch.Tensor, torch.Tensor]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.layer(x))


class Task(LightningModule):
    net: Net


def loss_fn(model: nn.Module, batch: Batch) -> torch.Tensor:
    return cross_entropy(model(batch[0]), batch[1])


hawq = HAWQ(weight_bits=(2, 4, 8), activation_bits=8, budget="12x")
trainer = Trainer(max_epochs=10, callbacks=[hawq])
assert_type(hawq.plan, Plan)
assert_type(hawq.sensitivity, Sensitivity)
assert_type(hawq.frontier, Frontier)
assert_type(hawq.sites, SiteTable)
assert_type(hawq.plan.bits, dict[str, int])

net, batches = Net(), [(torch.randn(8, 4), torch.randint(0, 3, (8,)))]
table = sites(net, batches[0])
sensitivity = measure(net, batches, loss_fn, sites=table, rtol=0.02, estimator="exact")
weighed = candidates(net, batches, sensitivity, table, loss_fn, config=QuantizerConfig(activation_bits=None))
plan = select(Problem(table, weighed, sensitivity), "12x")
assert_type(table, SiteTable)
assert_type(sensitivity, Sensitivity)
assert_type(weighed, Candidates)
assert_type(plan, Plan)
assert_type(frontier([[1.0, 0.0]], [[2.0, 4.0]]), Frontier)
assert_type([r.trace for r in sensitivity], list[float])

assert_type(quantize(net, plan), Net)
assert_type(unquantize(net), Net)
save_packed(net, plan, "net.hawq")
assert_type(load_packed("net.hawq", Net()), Net)
assert_type(load_from_checkpoint(Task, "last.ckpt"), Task)

MeasureConfig(sampling="all", stop_when="stable_plan")
HAWQ(budget={"bops": "50%"}, select=SelectConfig(selector="monotone"))
"""
MISTAKES = {
    'MeasureConfig(sampling="al")': "sampling",
    'MeasureConfig(stop_when="plan")': "stop_when",
    'QuantizerConfig(code_format="midriser")': "code_format",
    "measure(net, batches, loss_fn, rtl=0.02)": "rtl",
    'HAWQ(buget="12x")': "buget",
    "hawq.plan.bit": "bit",
}


def marked(rule: str) -> str:
    """The script, then every mistake on a line that a checker must complain of, or it complains of the mark."""
    return SCRIPT + "".join(f"{line}  # {rule}\n" for line in MISTAKES)


def run(folder: Path, *command: str) -> str:
    environment = {**os.environ, "MYPYPATH": str(ROOT)}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)
    return done.stdout + done.stderr if done.returncode else ""


@pytest.mark.stress
def test_mypy_strict_knows_what_the_public_names_give_and_sees_wrong_choices(tmp_path):
    (tmp_path / "script.py").write_text(marked("type: ignore"), "utf-8")
    settings = ("--strict", f"--config-file={ROOT / 'pyproject.toml'}", f"--cache-dir={ROOT / '.mypy_cache'}")
    said = run(tmp_path, sys.executable, "-m", "mypy", *settings, "script.py")
    assert not said, said


@pytest.mark.stress
@pytest.mark.skipif(shutil.which("pyright") is None, reason="pip install pyright (needs node)")
def test_pyright_strict_agrees(tmp_path):
    # torch's own stubs are partly unknown to it in strict mode: that is not of this package
    rules = '"reportUnknownMemberType": false, "reportUnnecessaryTypeIgnoreComment": true'
    settings = f'{{"typeCheckingMode": "strict", "extraPaths": ["{ROOT}"], {rules}, "enableTypeIgnoreComments": false}}'
    (tmp_path / "pyrightconfig.json").write_text(settings, "utf-8")
    (tmp_path / "script.py").write_text(marked("pyright: ignore"), "utf-8")
    said = run(tmp_path, "pyright", "--pythonpath", sys.executable)
    assert not said, said
