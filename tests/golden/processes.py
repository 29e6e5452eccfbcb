"""The script of the run with two processes: ``python -m tests.golden.processes FOLDER``."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import Callback

from tests.golden import api, facts, nets, runs


class Report(Callback):
    """Every process writes down what it holds in the end."""

    def __init__(self, folder: Path, callback: Any, losses: runs.Losses) -> None:
        self.folder, self.callback, self.losses = folder, callback, losses

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        record: facts.Record = {}
        runs.described(record, self.callback)
        facts.of_state(record, pl_module)
        record["training.losses"] = facts.array(self.losses.seen)
        torch.save(record, self.folder / f"rank{trainer.global_rank}.pt")


def main(folder: Path) -> None:
    """Fit on two processes."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    seed_everything(7, verbose=False)
    model, losses = nets.Learner(nets.build(nets.Plain)), runs.Losses()
    callback, callbacks = api.hawq(**{**runs.CHOSEN, "rtol": 0.2, "quantizer": "lsq", "dirpath": folder})
    settings = {"strategy": "ddp", "devices": 2, "max_epochs": 2}
    fitting = runs.trainer(folder, [*callbacks, losses, Report(folder, callback, losses)], **settings)
    fitting.fit(model, nets.loader(size=8))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
