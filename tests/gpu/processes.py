"""Training in processes that are started anew: ``python -m tests.gpu.processes KIND FOLDER DEVICE``."""

from __future__ import annotations

import sys

import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.accelerators import CUDAAccelerator
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy

from hawq_lightning import Plan
from tests.gpu.networks import QUIET, Task, hawq, loader


class OneGPU(CUDAAccelerator):
    """All processes on the first GPU, which the Trainer allows nobody to ask for."""

    @staticmethod
    def parse_devices(devices: int) -> list[int]:
        return [0] * int(devices)

    @staticmethod
    def get_parallel_devices(devices: list[int]) -> list[torch.device]:
        return [torch.device("cuda", 0) for _ in devices]


def main(kind: str, folder: str, device: str) -> None:
    """Fit and save every process's plan and weights."""
    seed_everything(3, verbose=False)
    settings = {"accelerator": "cpu" if device == "cpu" else "gpu", "devices": 1}
    callback = hawq()
    if kind == "gloo":
        settings |= {"devices": 2, "strategy": DDPStrategy(process_group_backend="gloo")}
        if device == "cuda":
            settings["accelerator"] = OneGPU()
    elif kind == "nccl":
        settings["strategy"] = DDPStrategy(process_group_backend="nccl")
    elif kind == "fsdp":
        settings["strategy"] = FSDPStrategy(state_dict_type="full")
        callback = hawq(plan=Plan.load(f"{folder}/plan.json"))
    task = Task()
    trainer = Trainer(max_epochs=2, callbacks=[callback], **QUIET, **settings)
    trainer.fit(task, loader())
    state = trainer.strategy.lightning_module_state_dict()
    bits = {s.name: s.bits for s in callback.plan.sites}
    torch.save(
        {"bits": bits, "state": {k: v.cpu() for k, v in state.items()}}, f"{folder}/rank{trainer.global_rank}.pt"
    )
    print("done", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
