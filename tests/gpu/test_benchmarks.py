"""The benchmarks that have a device run there, small."""

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
