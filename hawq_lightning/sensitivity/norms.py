"""Squared norms of per-image weight gradients, from what a layer read and the gradient at its output.

For every quantizable layer the gradient of image n is a product ``D_n U_n^T`` with U the unfolded input and D the
output gradient over T positions. Where T is small the norm comes from two T x T Gram matrices ("ghost norms",
Bu et al., arXiv:2205.10683), otherwise from the product itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from hawq_lightning.sites import layer_type

_TRANSPOSED = nn.modules.conv._ConvTransposeNd
_CHUNK = 1 << 25  # elements of per-image gradients formed at a time


@dataclass
class Use:
    """One call of a layer: what it read, and the output gradients of one or two backward passes."""

    layer: nn.Module
    read: torch.Tensor
    grad: torch.Tensor
    other: torch.Tensor | None = None


def inner_products(uses: Sequence[Use], per_image: bool) -> torch.Tensor:
    """``<G_n, G'_n>`` for every row n, G the weight gradient from ``grad`` and G' from ``other`` (or ``grad`` again).

    Args:
        uses: all calls that share one weight; their gradients are added before the product.
        per_image: a row is an index of the first axis; otherwise all of the batch is one row.

    Returns:
        float64, one value a row.
    """
    sides = []
    for use in uses:
        read, grad, other = _positions(use, per_image)
        sides.append((read, grad, other))
    u = torch.cat([s[0] for s in sides], -1) if len(sides) > 1 else sides[0][0]
    d = torch.cat([s[1] for s in sides], -1) if len(sides) > 1 else sides[0][1]
    same = all(use.other is None for use in uses)
    e = d if same else (torch.cat([s[2] for s in sides], -1) if len(sides) > 1 else sides[0][2])
    rows, groups, k, t = u.shape
    c = d.shape[2]
    if t * (k + c) < k * c:  # ghost
        gram = torch.matmul(u.mT, u)
        return (gram * torch.matmul(d.mT, e)).sum((1, 2, 3), dtype=torch.float64)
    step = max(1, _CHUNK // (groups * k * c))
    out = []
    for start in range(0, rows, step):
        part = slice(start, start + step)
        g = torch.matmul(d[part], u[part].mT)
        h = g if same else torch.matmul(e[part], u[part].mT)
        out.append((g * h).sum((1, 2, 3), dtype=torch.float64))
    return torch.cat(out)


def _positions(use: Use, per_image: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """U (rows, groups, K, T), D and D' (rows, groups, C, T) with G = D U^T."""
    layer, kind = use.layer, layer_type(use.layer)
    other = use.grad if use.other is None else use.other
    if kind is nn.Linear:
        read, grad, other = (
            x.reshape(x.shape[0], -1, x.shape[-1]).mT.unsqueeze(1) for x in (use.read, use.grad, other)
        )
    elif issubclass(kind, _TRANSPOSED):
        # the gradient of a transposed convolution is that of a convolution with input and output in each other's place
        grad, other = _unfold(layer, use.grad, use.read), _unfold(layer, other, use.read)
        read = _grouped(_batched(layer, use.read), layer.groups)  # type: ignore[arg-type]
        # G = read . unfold(grad)^T: the roles of C and K are swapped, the inner product is the same
    else:
        read = _unfold(layer, use.read, use.grad)
        grad = _grouped(_batched(layer, use.grad), layer.groups)  # type: ignore[arg-type]
        other = grad if use.other is None else _grouped(_batched(layer, other), layer.groups)  # type: ignore[arg-type]
    if per_image:
        return read, grad, other
    return tuple(x.permute(1, 2, 0, 3).reshape(1, x.shape[1], x.shape[2], -1) for x in (read, grad, other))  # type: ignore[return-value]


def _batched(layer: Any, x: torch.Tensor) -> torch.Tensor:
    return x if x.ndim == len(layer.kernel_size) + 2 else x.unsqueeze(0)


def _grouped(x: torch.Tensor, groups: int) -> torch.Tensor:
    return x.reshape(x.shape[0], groups, x.shape[1] // groups, -1)


def _unfold(layer: Any, x: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    """Patches of ``x`` at the positions of ``at``: (N, groups, C/groups * kernel, T), any number of dimensions."""
    x, at = _batched(layer, x), _batched(layer, at)
    kernel, stride, dilation = layer.kernel_size, layer.stride, layer.dilation
    transposed = issubclass(layer_type(layer), _TRANSPOSED)
    if isinstance(layer.padding, str) or (not transposed and layer.padding_mode != "zeros"):
        pads = list(layer._reversed_padding_repeated_twice)
    else:
        pads = [p for p in reversed(layer.padding) for _ in (0, 1)]
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
