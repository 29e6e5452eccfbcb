"""Second moments of what a layer multiplies its weight with: all that a layer-wise reconstruction needs of the data."""

from __future__ import annotations

import torch


class Moments:
    """``E[q q^T]`` and ``E[x q^T]`` of quantized (q) and float (x) patches, a matrix a group, and ``E[(w x)^2]``.

    Args:
        rows: the float weight, ``[groups, rows, columns]``.
    """

    def __init__(self, rows: torch.Tensor) -> None:
        groups, _, columns = rows.shape
        self._rows = rows
        self._gram = rows.new_zeros(groups, columns, columns)
        self._cross = torch.zeros_like(self._gram)
        self._power = rows.new_zeros(rows.shape[:2])
        self._count = 0

    def add(self, floating: torch.Tensor, quantized: torch.Tensor) -> None:
        """Take in the patches of one call, ``[groups, positions, columns]`` each."""
        x, q = floating.float(), quantized.float()
        self._gram += q.transpose(1, 2) @ q
        self._cross += x.transpose(1, 2) @ q
        self._power += (self._rows @ x.transpose(1, 2)).square_().sum(2)
        self._count += q.shape[1]

    def mean(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The three, over all positions."""
        count = max(self._count, 1)
        return self._gram / count, self._cross / count, self._power / count
