"""A user's short script: a float epoch, traces, plan, two epochs of fine-tuning, packed file; goes on from 'last'."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from hawq_lightning import save_packed
from hawq_lightning.callbacks import AtomicCheckpointIO
from hawq_lightning.sensitivity import WholeBatches
from tests.trainers import Augmented, Classifier, assert_mixed, hawq, loader, trainer

BATCHES = 4  # that traces are measured on


def short_run(folder: Path) -> None:
    """The whole script; every measured batch adds a byte to ``batches.log``."""
    folder.mkdir(parents=True, exist_ok=True)
    log = os.open(folder / "batches.log", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    original = WholeBatches.probe_batch

    def logged(self, *args):
        original(self, *args)
        os.write(log, b"b")

    WholeBatches.probe_batch = logged
    seed_everything(7, verbose=False)
    model = Classifier()
    callback = hawq(start_epoch=1, images=16 * BATCHES, rtol=0.02, loss_per_site=True)
    saver = ModelCheckpoint(folder, monitor="val_loss", save_last=True)
    fitting = trainer(
        folder, callback, saver, max_epochs=3, enable_checkpointing=True, plugins=[AtomicCheckpointIO()]
    )  # fmt: skip
    fitting.fit(model, DataLoader(Augmented(), 16, shuffle=True), loader(shuffle=False), ckpt_path="last")
    assert_mixed(model, callback)
    save_packed(model, callback.plan, folder / "model.safetensors")
    state = hashlib.sha256()
    for key, value in model.state_dict().items():
        state.update(key.encode() + value.numpy().tobytes())
    plan = callback.plan.to_dict()
    plan["settings"] = {k: v for k, v in plan["settings"].items() if not k.endswith("seconds")}
    found = {
        "plan": plan, "weights": state.hexdigest(),
        "traces": {r.name: [r.trace, r.stderr] for r in callback.sensitivity},
        "packed": hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest(),
    }  # fmt: skip
    (folder / "found.json").write_text(json.dumps(found))
