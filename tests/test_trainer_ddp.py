"""Two gloo processes hold the same plan, traces and weights, and those of one process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from .trainers import assert_mixed_elsewhere, plan_bits

ROOT = Path(__file__).parent.parent


def run(folder, strategy, devices):
    done = subprocess.run(
        [sys.executable, "-m", "tests.ddp_script", str(folder), strategy, str(devices)],
        cwd=ROOT, capture_output=True, text=True, timeout=150, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "done" in done.stdout
    return [torch.load(folder / f"rank{r}.pt", weights_only=True) for r in range(devices)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return run(tmp_path_factory.mktemp("alone"), "auto", 1)[0]


STRATEGIES = ["ddp", "ddp_spawn", pytest.param("ddp_fork", marks=pytest.mark.stress)]


@pytest.mark.feature(
    "Processes",
    "DDP (popen, spawn, fork), 2 processes",
    "works; traces, plan and weights are equal on all processes, the plan equals that of one process",
)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_processes(tmp_path, alone, strategy):
    ranks = run(tmp_path, strategy, 2)
    first, second = ranks
    assert first["world"] == 2 and alone["world"] == 1
    assert first["plan"] == second["plan"]
    assert_mixed_elsewhere(plan_bits(first["plan"]))
    assert first["traces"] == second["traces"]
    assert first["images"] == alone["images"]
    for site, trace in alone["traces"].items():
        assert first["traces"][site] == pytest.approx(trace, rel=1e-5, abs=1e-12)
    for mine, theirs in zip(first["plan"]["sites"], alone["plan"]["sites"]):
        assert (mine["name"], mine["bits"], mine["code"]) == (theirs["name"], theirs["bits"], theirs["code"])
        assert mine["omega"] == pytest.approx(theirs["omega"], rel=1e-5, abs=1e-12)
    running = ("running_mean", "running_var", "num_batches")  # BatchNorm's are each process's own in DDP
    for key, value in first["state"].items():
        if not any(r in key for r in running):
            assert torch.equal(value, second["state"][key]), key
    assert not torch.equal(first["state"]["net.0.weight"], alone["state"]["net.0.weight"])  # they did train apart


@pytest.mark.feature("Processes", "DDP, 4 processes", "works; likewise")
@pytest.mark.stress
def test_four_processes(tmp_path, alone):
    ranks = run(tmp_path, "ddp", 4)
    assert_mixed_elsewhere(plan_bits(ranks[0]["plan"]))
    assert all(r["plan"] == ranks[0]["plan"] and r["traces"] == ranks[0]["traces"] for r in ranks)
    for site, trace in alone["traces"].items():
        assert ranks[0]["traces"][site] == pytest.approx(trace, rel=1e-5, abs=1e-12)
