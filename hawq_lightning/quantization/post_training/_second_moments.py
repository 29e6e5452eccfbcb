"""Second moments of what a layer multiplies its weight with: all that a layer-wise reconstruction needs of the data."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

_ROWS = 32_768  # positions a call, about


def supports(layer: nn.Module) -> bool:
    """Whether :func:`patches` can lay out this layer's input: convolutions and linear layers."""
    return isinstance(layer, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d))


def groups_of(layer: Any) -> int:
    """Groups of a convolution; 1 for a linear layer."""
    return int(getattr(layer, "groups", 1))


def patches(layer: Any, x: torch.Tensor) -> torch.Tensor:
    """What each output position multiplies with the weight.

    Args:
        layer: convolution or linear layer.
        x: its input.

    Returns:
        ``[groups, positions, weights of one output channel]``; of every so many images where there are very many.
    """
    if isinstance(layer, nn.Linear):
        rows = x.reshape(-1, x.shape[-1])
        return rows[:: _stride(len(rows))][None]
    spatial = layer.weight.ndim - 2
    if x.ndim == spatial + 1:
        x = x[None]
    if layer.padding_mode != "zeros":
        x = F.pad(x, layer._reversed_padding_repeated_twice, mode=layer.padding_mode)
    else:
        x = F.pad(x, layer._reversed_padding_repeated_twice)
    for axis in range(spatial):
        size, step, gap = layer.kernel_size[axis], layer.stride[axis], layer.dilation[axis]
        x = x.unfold(axis + 2, (size - 1) * gap + 1, step)[..., ::gap]
    positions = x[0, 0].numel() // layer.weight[0, 0].numel()
    x = x[:: _stride(len(x) * positions)]
    # [N, C, positions..., kernel...] -> [groups, N * positions, C / groups * kernel]
    n, c = x.shape[:2]
    x = x.reshape(n, layer.groups, c // layer.groups, positions, layer.weight[0, 0].numel())
    return x.permute(1, 0, 3, 2, 4).reshape(layer.groups, n * positions, layer.weight[0].numel())


def _stride(positions: int) -> int:
    return -(-positions // _ROWS)


class Moments:
    """``E[q q^T]`` and ``E[x q^T]`` of quantized (q) and float (x) patches, a matrix a group, and ``E[(w x)^2]``.

    Args:
        rows: the float weight, ``[groups, rows, columns]``.
    """

    def __init__(self, rows: torch.Tensor) -> None:
        groups, _, columns = rows.shape
        self._rows = rows
        self._own = rows.new_zeros(groups, columns, columns)
        self._mixed = torch.zeros_like(self._own)
        self._power = rows.new_zeros(rows.shape[:2])
        self._count = 0

    def add(self, floating: torch.Tensor, quantized: torch.Tensor) -> None:
        """Take in the patches of one call, ``[groups, positions, columns]`` each."""
        x, q = floating.float(), quantized.float()
        self._own += q.transpose(1, 2) @ q
        self._mixed += x.transpose(1, 2) @ q
        self._power += (self._rows @ x.transpose(1, 2)).square_().sum(2)
        self._count += q.shape[1]

    def mean(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The three, over all positions."""
        count = max(self._count, 1)
        return self._own / count, self._mixed / count, self._power / count
