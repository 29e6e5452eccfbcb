"""The batches of a measurement, and which of them this process takes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from hawq_lightning._errors import HawqError
from hawq_lightning._types import Batch, BatchSizeFn
from hawq_lightning.sensitivity._on_device import OnDevice, on_device
from hawq_lightning.sensitivity._process_shard import ProcessShard


@dataclass(frozen=True)
class BatchSet:
    """All batches, each on the model's device when it is asked for.

    Attributes:
        batches: the same on every process.
        samples: number of samples of each.
        batch_size_fn: that counts them.
        shard: of this process.
    """

    batches: OnDevice
    samples: Sequence[int]
    batch_size_fn: BatchSizeFn
    shard: ProcessShard

    @classmethod
    def of(
        cls, model: nn.Module, batches: Iterable[Batch], batch_size_fn: BatchSizeFn, shard: ProcessShard | None = None
    ) -> BatchSet:
        """Count the batches of an iterable.

        Args:
            model: says on which device.
            batches: the iterable.
            batch_size_fn: number of samples in a batch.
            shard: of this process; ``None``: there is no other.

        Raises:
            HawqError: there is no batch.
        """
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        moved = on_device(batches, device)
        if not len(moved):
            raise HawqError("No batches to measure on: the dataloader or iterable is empty.")
        return cls(moved, moved.samples(batch_size_fn), moved.size_of or batch_size_fn, shard or ProcessShard())

    @property
    def local(self) -> range:
        """Numbers of this process's batches."""
        return range(self.shard.rank, len(self.batches), self.shard.world)

    @property
    def start(self) -> list[int]:
        """Position of each batch's first sample among all samples; the last entry is their number."""
        return [0, *torch.tensor(list(self.samples)).cumsum(0).tolist()]
