"""Changes of one weight, made where they are used: those of all weights would take a network's memory each."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeAlias

import torch

Rows: TypeAlias = slice | torch.Tensor
"""A range along an axis, or indices."""


class Directions:
    """Tensors of a weight's shape. A subclass overrides :meth:`part`, and calls this with what it counts.

    Args:
        count: how many.
        shape: of the weight.
    """

    def __init__(self, count: int, shape: torch.Size) -> None:
        self.shape = torch.Size((count, *shape))

    def __len__(self) -> int:
        return self.shape[0]

    def __iter__(self) -> Iterator[torch.Tensor]:
        return iter(self.whole())

    def part(self, axis: int, rows: Rows) -> torch.Tensor:
        """Some rows of all of them, ``[count, *shape]`` with that axis cut.

        Args:
            axis: of the weight.
            rows: along it.
        """
        raise NotImplementedError

    def whole(self) -> torch.Tensor:
        """All of them, ``[count, *shape]``."""
        return self.part(0, slice(None))


class KeptDirections(Directions):
    """Those that are there.

    Args:
        tensor: ``[count, *shape]``.
    """

    def __init__(self, tensor: torch.Tensor) -> None:
        super().__init__(len(tensor), tensor.shape[1:])
        self._tensor = tensor

    def part(self, axis: int, rows: Rows) -> torch.Tensor:
        """See :meth:`Directions.part`."""
        return self._tensor[(slice(None),) * (axis + 1) + (rows,)]
