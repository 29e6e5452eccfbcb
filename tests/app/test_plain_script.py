"""The plain script of recipes/resnet20_cifar10 on a few drawn images."""

import json
from pathlib import Path

import torch
from PIL import Image

from hawq_lightning import Plan
from hawq_lightning.models import resnet20
from tests.console import python

SCRIPT = Path(__file__).resolve().parents[2] / "recipes" / "resnet20_cifar10" / "train.py"


def test_the_script_is_short_and_runs(tmp_path):
    assert len(SCRIPT.read_text().splitlines()) <= 60
    for split in ("train", "val"):
        for label in range(10):
            folder = tmp_path / "data" / split / f"class{label}"
            folder.mkdir(parents=True)
            for i in range(4):
                Image.effect_noise((32, 32), 20 + 10 * label + i).convert("RGB").save(folder / f"{i}.jpg")
    torch.manual_seed(0)
    torch.save(resnet20().state_dict(), tmp_path / "weights.pt")
    done = python(SCRIPT, "data", "weights.pt", "--budget", "10.67x", "--out", tmp_path, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "result.json").read_text())
    assert found["w_comp"] >= 10.67 and found["file_bytes"] == (tmp_path / "model.safetensors").stat().st_size
    assert len({s.bits for s in Plan.load(tmp_path / "plan.json").weights}) >= 2
