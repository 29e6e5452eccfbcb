"""im2col: what a convolution multiplies with its weight at every output position."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias, cast

import torch
from torch import nn
from torch.nn import functional as F

Conv: TypeAlias = nn.modules.conv._ConvNd


def as_conv(layer: nn.Module) -> Conv:
    """The layer, which is a convolution, as one."""
    return cast(Conv, layer)


def with_batch_axis(layer: Conv, x: torch.Tensor) -> torch.Tensor:
    """``x`` with an axis of samples, if the convolution was called without."""
    return x if x.ndim == len(layer.kernel_size) + 2 else x.unsqueeze(0)


def paddings(layer: Conv, transposed: bool = False) -> list[int]:
    """What ``F.pad`` takes, last axis first."""
    if isinstance(layer.padding, str) or (layer.padding_mode != "zeros" and not transposed):
        return list(layer._reversed_padding_repeated_twice)
    return [int(p) for p in reversed(layer.padding) for _ in (0, 1)]


def patch_view(layer: Conv, x: torch.Tensor, positions: Sequence[int], transposed: bool = False) -> torch.Tensor:
    """Patches of ``x``, without a copy where there is no padding.

    Args:
        layer: a convolution of any number of dimensions; of a transposed one input and output change places.
        x: ``[N, C, *spatial]``.
        positions: how many there are along each spatial axis.
        transposed: whether the layer is a transposed convolution.

    Returns:
        ``[N, C, *kernel_size, *positions]``, a view.
    """
    kernel, stride, dilation = layer.kernel_size, layer.stride, layer.dilation
    pads = paddings(layer, transposed)
    # enough for the last patch (transposed layers can ask for more by their output padding)
    for i, (k, s, d) in enumerate(zip(kernel, stride, dilation)):
        axis = len(kernel) - 1 - i
        have = x.shape[2 + i] + pads[2 * axis] + pads[2 * axis + 1]
        need = (positions[i] - 1) * s + d * (k - 1) + 1
        pads[2 * axis + 1] += max(0, need - have) if transposed else 0
    mode = "constant" if transposed or layer.padding_mode == "zeros" else layer.padding_mode
    if any(pads):
        x = F.pad(x, pads, mode=mode)
    x = x.contiguous()
    spatial = x.stride()[2:]
    return x.as_strided(
        (*x.shape[:2], *kernel, *positions),
        (*x.stride()[:2], *(s * d for s, d in zip(spatial, dilation)), *(s * d for s, d in zip(spatial, stride))),
    )


def patch_counts(layer: Conv, x: torch.Tensor) -> list[int]:
    """Output positions of a convolution along each spatial axis of ``x``, ``[N, C, *spatial]``."""
    pads, dims = paddings(layer), len(layer.kernel_size)
    return [
        (size + pads[2 * (dims - 1 - i)] + pads[2 * (dims - 1 - i) + 1] - layer.dilation[i] * (layer.kernel_size[i] - 1)
         - 1) // layer.stride[i] + 1
        for i, size in enumerate(x.shape[2:])
    ]  # fmt: skip


def unfold(layer: Conv, x: torch.Tensor, like: torch.Tensor, transposed: bool = False) -> torch.Tensor:
    """Patches of ``x`` at the positions of ``like``: ``[N, groups, C / groups * kernel, T]``."""
    x, like = with_batch_axis(layer, x), with_batch_axis(layer, like)
    positions = like.shape[2:]
    view = patch_view(layer, x, positions, transposed)
    return view.reshape(len(x), layer.groups, -1, int(torch.Size(positions).numel()))


def convolved(layer: Conv, x: torch.Tensor, weight: torch.Tensor, transposed: bool = False) -> torch.Tensor:
    """``[N, C, *spatial]`` of a convolution with another weight, and without its bias."""
    x = with_batch_axis(layer, x)
    pads, dims = paddings(layer, transposed), len(layer.kernel_size)
    if (layer.padding_mode != "zeros" and not transposed) or any(pads[2 * i] != pads[2 * i + 1] for i in range(dims)):
        x = F.pad(x, pads, mode="constant" if layer.padding_mode == "zeros" else layer.padding_mode)
        pads = [0] * (2 * dims)
    return torch.convolution(
        x, weight.to(x.dtype), None, layer.stride, list(reversed(pads[::2])), layer.dilation, transposed,
        layer.output_padding, layer.groups,
    )  # fmt: skip
