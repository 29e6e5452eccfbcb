"""Checkpoints of a run hold what a run goes on from: tensors and plain values."""

from __future__ import annotations

from pathlib import Path

import torch
from lightning.pytorch import Trainer

from hawq_lightning._types import StateDict
from hawq_lightning.callbacks.fault_tolerance import AtomicCheckpointIO, write_checkpoints_atomically

_ARGUMENTS = ("hyper_parameters", "datamodule_hyper_parameters")
_PLAIN = (str, int, float, bool, type(None), torch.Tensor, torch.dtype, torch.device)


class PlainCheckpointIO(AtomicCheckpointIO):
    """Leaves out arguments that are objects, such as a network or a partial optimizer in ``save_hyperparameters``.

    A run makes its network and task from its settings; and a file with objects is not read (``weights_only``).
    """

    def save_checkpoint(self, checkpoint: StateDict, path: str | Path, storage_options: object | None = None) -> None:
        """Write the checkpoint under ``path``.

        Raises:
            HawqError: it cannot be written there.
        """
        kept = {
            name: {k: v for k, v in value.items() if _is_plain(v)} if name in _ARGUMENTS else value
            for name, value in checkpoint.items()
        }
        super().save_checkpoint(kept, path, storage_options)


def write_plain_checkpoints(trainer: Trainer) -> None:
    """Unless the strategy or the user has a way of their own: see :class:`PlainCheckpointIO`."""
    write_checkpoints_atomically(trainer)
    if type(trainer.strategy.checkpoint_io) is AtomicCheckpointIO:
        trainer.strategy.checkpoint_io = PlainCheckpointIO()


def _is_plain(value: object) -> bool:
    if isinstance(value, dict):
        return all(_is_plain(v) for pair in value.items() for v in pair)
    if isinstance(value, (list, tuple, set)):
        return all(map(_is_plain, value))
    return isinstance(value, _PLAIN)
