"""The benchmarks that have a device run there, small; what follows from their tables."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    "command",
    [
        "training_step.py --networks resnet20 --methods float,uniform --rounds 1 --steps 1 --precision bf16",
        "traces_full_size.py --networks resnet20 --images 2 --methods ours --seconds 0",
        "trace_cost.py --models resnet20 --repeat 1 --threads 1",
    ],
)
def test_a_table_is_written_for_the_device(device, tmp_path, command):
    file, *arguments = command.split()
    script = [sys.executable, str(ROOT / "benchmarks" / file), *arguments, "--device", device, "--out", str(tmp_path)]
    done = subprocess.run(
        script, capture_output=True, text=True, timeout=900, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (written,) = tmp_path.glob("*.json")
    assert ("cuda" in written.stem) == (device == "cuda") and ("bf16" in written.stem) == ("bf16" in command)
    assert json.loads(written.read_text()) and written.with_suffix(".md").is_file()


def test_figures_of_a_gpu_take_the_place_of_assumptions(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    scaling = __import__("scaling")
    assert {how for _, how in scaling.measured(tmp_path).values()} == {"assumed"}
    before = scaling.on_paper(scaling.measured(tmp_path))
    step = {"cpu": "A card", "networks": {"resnet50": {"uniform": {"seconds": [0.5, 0.4, 0.6]}}}}
    (tmp_path / "training_step_cuda_bf16.json").write_text(json.dumps(step))
    probe = {
        "machine": "A card",
        "networks": {"resnet50": {"setting": [32], "methods": {"ours": {"probe_seconds": 1}}}},
    }
    (tmp_path / "traces_full_size_cuda.json").write_text(json.dumps(probe))
    found = scaling.measured(tmp_path)
    assert found["step"][0] == 0.5 and found["probe"][0] == 2.0 and all("A card" in how for _, how in found.values())
    assert scaling.on_paper(found)[0]["traces_seconds"] > 7 * before[0]["traces_seconds"]
