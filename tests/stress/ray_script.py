"""Two workers of Ray Train: ``python -m tests.stress.ray_script FOLDER [KILL]``; or plain DDP, ``... FOLDER ddp``.

``KILL`` is the epoch at whose end the second worker is killed, once; the run then goes on from Ray's last checkpoint.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import torch
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import Callback
from torch.utils.data import DataLoader

from tests.trainer.ddp_script import SEED, Plain, Report
from tests.trainers import blobs, hawq, trainer

EPOCHS = 4


class KillOnce(Callback):
    """Kills the process of rank 1 after an epoch, before it reports to Ray, the first time only."""

    def __init__(self, folder: str, epoch: int) -> None:
        self.mark, self.epoch = Path(folder, "killed"), epoch

    def on_train_epoch_end(self, trainer, pl_module):
        if trainer.current_epoch == self.epoch and trainer.global_rank == 1 and not self.mark.exists():
            time.sleep(5)  # Ray's controller looks for reports in intervals
            self.mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)


def fit(folder: str, callbacks: list[Callback], ckpt_path: str | None = None, **settings: object) -> None:
    """The same in every kind of process: two of these make one batch of 16."""
    torch.set_num_threads(1)
    seed_everything(SEED, verbose=False)
    callback = hawq(dirpath=folder)
    alone = trainer(folder, callback, *callbacks, Report(folder, callback), max_epochs=EPOCHS, **settings)
    if settings.get("plugins"):
        from ray.train.lightning import prepare_trainer

        alone = prepare_trainer(alone)
    alone.fit(Plain(), DataLoader(blobs(), 8), ckpt_path=ckpt_path, weights_only=False)


def worker(config: dict[str, object]) -> None:
    """What Ray runs in every worker."""
    import ray.train
    from ray.train.lightning import RayDDPStrategy, RayLightningEnvironment, RayTrainReportCallback

    folder, kill = str(config["folder"]), int(str(config["kill"]))
    callbacks = [KillOnce(folder, kill), RayTrainReportCallback()]
    settings = {"strategy": RayDDPStrategy(), "plugins": [RayLightningEnvironment()], "devices": "auto"}
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        fit(folder, callbacks, **settings)
    else:
        Path(folder, f"resumed{ray.train.get_context().get_world_rank()}").touch()
        with checkpoint.as_directory() as place:
            fit(folder, callbacks, f"{place}/{RayTrainReportCallback.CHECKPOINT_NAME}", **settings)


def main(folder: str, kill: int = -1) -> None:
    """Two CPU workers."""
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    found = {"env_vars": {"PYTHONPATH": os.getcwd()}}
    ray.init(num_cpus=3, include_dashboard=False, log_to_driver=False, runtime_env=found)
    run = RunConfig(name="run", storage_path=folder, failure_config=FailureConfig(max_failures=1))
    scaling = ScalingConfig(num_workers=2, use_gpu=False)
    loop = {"folder": folder, "kill": kill}
    TorchTrainer(worker, train_loop_config=loop, scaling_config=scaling, run_config=run).fit()
    ray.shutdown()
    print("done", flush=True)


if __name__ == "__main__":
    if sys.argv[2:] == ["ddp"]:
        fit(sys.argv[1], [], strategy="ddp", devices=2)
        print("done", flush=True)
    else:
        main(sys.argv[1], *map(int, sys.argv[2:]))
