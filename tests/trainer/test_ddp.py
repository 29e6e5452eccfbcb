"""Two gloo processes hold the same plan, traces and weights, and those of one process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.console import Program
from tests.trainer import ddp_script
from tests.trainers import assert_mixed_elsewhere, plan_bits

ROOT = Path(__file__).parent.parent.parent


def ranks_of(done, folder, devices):
    assert done.returncode == 0, done.stderr[-3000:]
    assert "done" in done.stdout
    return [torch.load(folder / f"rank{r}.pt", weights_only=True) for r in range(devices)]


def run(folder, strategy, devices, *quantizer):
    if strategy != "ddp":
        return ranks_of(Program(ddp_script.main, str(folder), strategy, devices, cwd=ROOT).end(), folder, devices)
    done = subprocess.run(
        [sys.executable, "-m", "tests.trainer.ddp_script", str(folder), strategy, str(devices), *quantizer],
        cwd=ROOT, capture_output=True, text=True, timeout=150, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    return ranks_of(done, folder, devices)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return run(tmp_path_factory.mktemp("alone"), "auto", 1)[0]


STRATEGIES = ["ddp", *(pytest.param(s, marks=pytest.mark.stress) for s in ("ddp_spawn", "ddp_fork"))]


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


@pytest.mark.stress
def test_learned_steps_of_two_processes_are_those_of_one(tmp_path):
    first, second = run(tmp_path, "ddp", 2, "lsq")
    (tmp_path / "alone").mkdir()
    ddp_script.learn(tmp_path / "alone", "auto", 1, "lsq", tmp_path / "plan.json")
    alone = torch.load(tmp_path / "alone" / "rank0.pt", weights_only=True)
    assert plan_bits(first["plan"]) == plan_bits(second["plan"]) == plan_bits(alone["plan"])
    start = {f"{s['layers'][0]}.input_quantizer.step": s["scale"] for s in first["plan"]["sites"] if "scale" in s}
    assert len(start) == 3 and all(first["state"][k].item() != pytest.approx(v, rel=1e-4) for k, v in start.items())
    assert sum(k.endswith("quantizer.step") for k in first["state"]) == 6
    for key, value in alone["state"].items():
        assert torch.equal(first["state"][key], second["state"][key]), key
        assert torch.allclose(first["state"][key], value, rtol=1e-5, atol=1e-5), key


@pytest.mark.feature("Processes", "DDP, 4 processes", "works; likewise")
@pytest.mark.stress
def test_four_processes(tmp_path, alone):
    ranks = run(tmp_path, "ddp", 4)
    assert_mixed_elsewhere(plan_bits(ranks[0]["plan"]))
    assert all(r["plan"] == ranks[0]["plan"] and r["traces"] == ranks[0]["traces"] for r in ranks)
    for site, trace in alone["traces"].items():
        assert ranks[0]["traces"][site] == pytest.approx(trace, rel=1e-5, abs=1e-12)
