"""One process's part of a measurement that several share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

AllReduceSum = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class ProcessShard:
    """Every ``world``-th batch from ``rank`` on. All processes hold all batches, and draw the same random numbers.

    Attributes:
        rank: of this process.
        world: number of processes.
        all_reduce_sum: adds a float64 tensor up over all processes; every process calls it equally often.
    """

    rank: int = 0
    world: int = 1
    all_reduce_sum: AllReduceSum | None = None

    def sum(self, table: torch.Tensor) -> torch.Tensor:
        """``table`` added up over all processes."""
        return table if self.all_reduce_sum is None else self.all_reduce_sum(table)
