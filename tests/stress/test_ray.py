"""Ray Train's workers are plain DDP's processes, a killed one is made up for, and a sweep's runs are Ray's tasks."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("ray", reason="pip install 'hawq-lightning[ray]'")
pytestmark = pytest.mark.stress
ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0"}


def run(folder, *how):
    command = [sys.executable, "-m", "tests.stress.ray_script", str(folder), *how]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900, env=ENVIRONMENT)
    assert done.returncode == 0 and "done" in done.stdout, done.stderr[-3000:]
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return run(tmp_path_factory.mktemp("ddp"), "ddp")


def untimed(plan):
    return plan | {"settings": {k: v for k, v in plan["settings"].items() if "seconds" not in k}}


@pytest.mark.parametrize("kill", [[], ["2"]])
def test_two_workers_are_two_processes_of_ddp(tmp_path, plain, kill):
    ranks = run(tmp_path, *kill)
    assert bool(list(tmp_path.glob("resumed*"))) == bool(kill)
    for mine, theirs in zip(ranks, plain):
        assert mine["world"] == theirs["world"] == 2
        assert untimed(mine["plan"]) == untimed(theirs["plan"])
        assert all(torch.equal(v, theirs["state"][k]) for k, v in mine["state"].items())


def test_the_code_of_the_page_runs(tmp_path):
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/how-to/ray.md").read_text(), re.S)
    (tmp_path / "my_project.py").write_text(
        "from tests.trainer.ddp_script import Plain as Task\nfrom tests.trainers import loader as train_loader\n"
    )
    (tmp_path / "script.py").write_text(code.replace("FOLDER", repr(str(tmp_path / "ray"))))
    environment = ENVIRONMENT | {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
    command = [sys.executable, "script.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=900, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert list((tmp_path / "ray").rglob("checkpoint.ckpt"))


def test_a_sweep_by_ray(tmp_path):
    pytest.importorskip("hydra_plugins.hydra_ray_launcher")
    script = "from hawq_lightning.cli import train_main; train_main()"
    settings = ["debug=fast", "model.depth=8", "model.channels=4", "trainer=cpu", "callbacks=none", "logger=none",
                "report=false", f"paths.runs={tmp_path / 'runs'}", f"paths.cache={tmp_path / 'cache'}"]  # fmt: skip
    command = [sys.executable, "-c", script, "-m", "launcher=ray", "seed=1,2", *settings]
    environment = ENVIRONMENT | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=900, env=environment)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    assert len(list((tmp_path / "runs").rglob("metrics.json"))) == 2
