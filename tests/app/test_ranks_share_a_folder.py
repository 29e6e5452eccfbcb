"""The processes of one run share its folder and the lock on it; a second run of two processes is refused."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time

from lightning.fabric.utilities.rank_zero import rank_zero_only

from hawq_lightning import Plan
from tests import console
from tests.internals import internal

FAST = [
    "debug=fast", "model.depth=8", "model.channels=4", "trainer=cpu", "logger=none", "measure.loss_per_site=false",
    "measure.forecast=null",
    "~callbacks.progress", "report=false", "trainer.devices=2", "+trainer.strategy=ddp", "hydra.run.dir=run",
]  # fmt: skip


def as_a_rank():
    """What a new Python would see of its environment."""
    rank_zero_only.rank = int(os.environ["RANK"])
    internal("cli._run_folder")._PATIENCE = 0.3


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return str(found.getsockname()[1])


def ranks(folder, port, *more):
    """As torchrun starts them."""
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0", "MASTER_ADDR": "127.0.0.1",
              "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": port}  # fmt: skip
    return [
        console.begin("hawq-lightning", *FAST, *more, cwd=folder, before=as_a_rank, RANK=r, LOCAL_RANK=r, **shared)
        for r in ("0", "1")
    ]


def test_ranks_of_one_run_share_the_lock_and_another_run_is_refused(tmp_path):
    first = ranks(tmp_path, free_port())
    manifest = tmp_path / "run" / ".hawq_lightning.json"
    deadline = time.monotonic() + 120
    while not manifest.is_file() and time.monotonic() < deadline:
        time.sleep(0.02)
    other = ranks(tmp_path, free_port(), "select.budget=6x")
    refused = other[0].end()
    with contextlib.suppress(ProcessLookupError):  # it has ended
        other[1].kill()  # as torchrun does when one has failed
    other[1].end()
    assert refused.returncode == 1 and "Another run is at work in" in refused.stderr, refused
    for done in [program.end() for program in first]:
        assert done.returncode == 0, done.stderr[-3000:]
    assert Plan.load(tmp_path / "run" / "plan.json").budget == "8x"
    made = json.loads(manifest.read_text())
    assert made["committed"] and "model.safetensors" in made["files"]
