"""The file by which spawned processes hand their plan to the parent."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hawq_lightning.quantization import enabled_bits
from tests.trainers import Classifier, hawq, loader, trainer


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def test_a_plan_of_processes_that_were_spawned_stays_with_its_model(tmp_path):
    callback = hawq()
    spawned = {"strategy": "ddp_spawn", "devices": 1}
    first = Classifier()
    trainer(tmp_path, callback, **spawned).fit(first, loader())
    relay = callback._handoff.path
    assert relay.is_file()
    never_fitted = Classifier()
    callback.setup(trainer(tmp_path, callback), first, "validate")
    assert enabled_bits(first)
    callback.setup(trainer(tmp_path, callback), never_fitted, "validate")
    assert not enabled_bits(never_fitted)


def test_what_processes_tell_each_other_by_is_removed_at_the_end():
    code = "from hawq_lightning import ApplyPlan; c = ApplyPlan()._handoff; c.path.write_text('x'); print(c.path)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    path = Path(done.stdout.strip())
    assert path.name.startswith("hawq_lightning-") and not path.exists()
