"""Two processes on one GPU, one by NCCL, and FSDP with a plan that was saved."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.gpu.networks import Task, batches, measured

ROOT = Path(__file__).resolve().parents[2]


def run(kind, folder, device, ranks=1):
    command = [sys.executable, "-m", "tests.gpu.processes", kind, str(folder), device]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, env=environment)
    assert done.returncode == 0 and "done" in done.stdout, done.stderr[-3000:]
    return [torch.load(folder / f"rank{r}.pt", weights_only=True) for r in range(ranks)]


def trains_alike(first, second):
    running = ("running_mean", "running_var", "num_batches")  # each process's own in DDP
    return all(
        torch.equal(v, second["state"][k]) for k, v in first["state"].items() if not any(r in k for r in running)
    )


def test_two_processes_by_gloo(device, tmp_path):
    first, second = run("gloo", tmp_path, device, 2)
    assert first["bits"] == second["bits"] and len(set(first["bits"].values())) > 1
    assert trains_alike(first, second)


@pytest.mark.gpu
def test_one_process_by_nccl(cuda, tmp_path):
    (tmp_path / "alone").mkdir(), (tmp_path / "nccl").mkdir()
    (alone,), (nccl,) = run("alone", tmp_path / "alone", cuda), run("nccl", tmp_path / "nccl", cuda)
    assert alone["bits"] == nccl["bits"]


@pytest.mark.gpu
def test_fsdp_with_a_saved_plan(cuda, tmp_path):
    _, plan = measured(Task(), batches())
    plan.save(tmp_path / "plan.json")
    (done,) = run("fsdp", tmp_path, cuda)
    assert done["bits"] == {s.name: s.bits for s in plan.sites}
