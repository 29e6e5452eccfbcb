"""The plain scripts of the big recipes, as a user runs them, on small real-format data and few epochs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hawq_lightning import Plan
from hawq_lightning.data import write_coco, write_image_folder

pytestmark = pytest.mark.stress
RECIPES = Path(__file__).resolve().parents[2] / "recipes"
CLASSES = 3


def float_weights(recipe: str, path: Path) -> Path:
    """Random weights of the recipe's network."""
    torch.manual_seed(0)
    if recipe == "retinanet_coco":
        from hawq_lightning.models import retinanet_resnet50

        net = retinanet_resnet50(CLASSES)
    elif recipe == "inceptionv3_imagenet":
        from hawq_lightning.models import inception_v3

        net = inception_v3(CLASSES)
    elif recipe == "squeezenext_imagenet":
        from hawq_lightning.models import squeezenext

        net = squeezenext(CLASSES)
    else:
        from hawq_lightning.models import resnet50

        net = resnet50(CLASSES)
    torch.save(net.state_dict(), path)
    return path


@pytest.mark.parametrize(
    ("recipe", "size"),
    [("resnet50_imagenet", ["64"]), ("squeezenext_imagenet", ["64"]), ("inceptionv3_imagenet", ["299"]),
     ("retinanet_coco", ["64", "96"])],
)  # fmt: skip
def test_the_plain_script_runs(recipe, size, tmp_path):
    if recipe == "retinanet_coco":
        data = write_coco(tmp_path / "data", classes=CLASSES, train=4, val=2)
    else:
        data = write_image_folder(tmp_path / "data", classes=CLASSES, train=2, val=2, size=max(int(size[0]), 64))
    weights = float_weights(recipe, tmp_path / "float.pt")
    named = [str(weights)] if recipe == "retinanet_coco" else ["--weights", str(weights)]
    done = subprocess.run(
        [sys.executable, RECIPES / recipe / "train.py", str(data), *named, "--classes", str(CLASSES), "--epochs", "1",
         "--size", *size, "--batch", "2", "--images", "4", "--rtol", "0.9", "--workers", "0", "--out",
         str(tmp_path / "run")],
        capture_output=True, text=True, check=False, timeout=900, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    plan = Plan.load(tmp_path / "run" / "plan.json")
    assert len({s.bits for s in plan.weights}) > 1
    size_now = (tmp_path / "run" / "model.safetensors").stat().st_size
    assert f"{size_now} bytes" in done.stdout
    assert size_now < weights.stat().st_size / 4
