"""What a layer multiplied at every position, as matrices: its weight gradient is their product."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from hawq_lightning._sites import layer_type

TRANSPOSED = nn.modules.conv._ConvTransposeNd


@dataclass
class LayerCall:
    """One call of a layer: what it read, and the output gradients of one or two backward passes."""

    layer: nn.Module
    read: torch.Tensor
    grad: torch.Tensor
    other: torch.Tensor | None = None


def positions(use: LayerCall, per_image: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """U (rows, groups, K, T), D and D' (rows, groups, C, T) with G = D U^T."""
    layer, kind = use.layer, layer_type(use.layer)
    other = use.grad if use.other is None else use.other
    if kind is nn.Linear:
        read, grad, other = (
            x.reshape(x.shape[0], -1, x.shape[-1]).mT.unsqueeze(1) for x in (use.read, use.grad, other)
        )
    elif issubclass(kind, TRANSPOSED):
        # the gradient of a transposed convolution is that of a convolution with input and output in each other's place
        grad, other = _unfold(layer, use.grad, use.read), _unfold(layer, other, use.read)
        read = _grouped(batched(layer, use.read), layer.groups)  # type: ignore[arg-type]
        # G = read . unfold(grad)^T: the roles of C and K are swapped, the inner product is the same
    else:
        read = _unfold(layer, use.read, use.grad)
        grad = _grouped(batched(layer, use.grad), layer.groups)  # type: ignore[arg-type]
        other = grad if use.other is None else _grouped(batched(layer, other), layer.groups)  # type: ignore[arg-type]
    if per_image:
        return read, grad, other
    return tuple(x.permute(1, 2, 0, 3).reshape(1, x.shape[1], x.shape[2], -1) for x in (read, grad, other))  # type: ignore[return-value]


def batched(layer: Any, x: torch.Tensor) -> torch.Tensor:
    """With an axis of images, if the layer was called without."""
    return x if x.ndim == len(layer.kernel_size) + 2 else x.unsqueeze(0)


def paddings(layer: Any) -> list[int]:
    """What ``F.pad`` takes, last axis first."""
    if isinstance(layer.padding, str) or (
        layer.padding_mode != "zeros" and not issubclass(layer_type(layer), TRANSPOSED)
    ):
        return list(layer._reversed_padding_repeated_twice)
    return [p for p in reversed(layer.padding) for _ in (0, 1)]


def _grouped(x: torch.Tensor, groups: int) -> torch.Tensor:
    return x.reshape(x.shape[0], groups, x.shape[1] // groups, -1)


def _unfold(layer: Any, x: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    """Patches of ``x`` at the positions of ``at``: (N, groups, C/groups * kernel, T), any number of dimensions."""
    x, at = batched(layer, x), batched(layer, at)
    kernel, stride, dilation = layer.kernel_size, layer.stride, layer.dilation
    transposed = issubclass(layer_type(layer), TRANSPOSED)
    pads = paddings(layer)
    # enough for the last patch (transposed layers can ask for more by their output padding)
    for i, (k, s, d) in enumerate(zip(kernel, stride, dilation)):
        axis = len(kernel) - 1 - i
        have = x.shape[2 + i] + pads[2 * axis] + pads[2 * axis + 1]
        need = (at.shape[2 + i] - 1) * s + d * (k - 1) + 1
        pads[2 * axis + 1] += max(0, need - have) if transposed else 0
    mode = "constant" if transposed or layer.padding_mode == "zeros" else layer.padding_mode
    if any(pads):
        x = F.pad(x, pads, mode=mode)
    x = x.contiguous()
    n, c, *_ = x.shape
    spatial = x.stride()[2:]
    view = x.as_strided(
        (n, c, *kernel, *at.shape[2:]),
        (*x.stride()[:2], *(s * d for s, d in zip(spatial, dilation)), *(s * d for s, d in zip(spatial, stride))),
    )
    groups = layer.groups
    return view.reshape(n, groups, -1, int(torch.Size(at.shape[2:]).numel()))
