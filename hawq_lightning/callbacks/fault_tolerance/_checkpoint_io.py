"""Checkpoints that a crash cannot cut short."""

from __future__ import annotations

import io
from pathlib import Path

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import Trainer

from hawq_lightning._io import write_bytes
from hawq_lightning._types import StateDict
from hawq_lightning.callbacks._trainer import is_sharded, kinds


class AtomicCheckpointIO(TorchCheckpointIO):
    """Give it to the Trainer (``plugins=[AtomicCheckpointIO()]``): a checkpoint is the old one or the new one.

    Lightning writes into the system's temporary folder and moves the file; where that folder is another file system
    (``/tmp`` in memory, runs on a disk) the move is a copy, and a process that dies within leaves half a ``last.ckpt``.
    Here the temporary file lies beside the checkpoint. Remote paths are written as Lightning does.
    """

    def save_checkpoint(self, checkpoint: StateDict, path: str | Path, storage_options: object | None = None) -> None:
        """Write the checkpoint under ``path``.

        Raises:
            HawqError: it cannot be written there.
        """
        if "://" in str(path) or storage_options is not None:
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        data = io.BytesIO()
        torch.save(checkpoint, data)
        write_bytes(Path(path), bytearray(data.getbuffer()))


def write_checkpoints_atomically(trainer: Trainer) -> None:
    """Unless the strategy or the user has a way of their own: see :class:`AtomicCheckpointIO`."""
    if not is_sharded(trainer) and type(trainer.strategy.checkpoint_io) in kinds(
        "plugins.TorchCheckpointIO", fabric=True
    ):
        trainer.strategy.checkpoint_io = AtomicCheckpointIO()
