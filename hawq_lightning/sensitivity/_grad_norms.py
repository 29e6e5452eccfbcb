"""Squared norms of per-image weight gradients, from what a layer read and the gradient at its output.

For every quantizable layer the gradient of image n is a product ``D_n U_n^T`` with U the unfolded input and D the
output gradient over T positions. Where T is small the norm comes from two T x T Gram matrices ("ghost norms",
Bu et al., arXiv:2205.10683); otherwise from the gradient itself, which is that product or, where unfolding would copy
much, what the convolution's own backward kernel gives.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import nn

from hawq_lightning._sites import layer_type
from hawq_lightning.sensitivity._unfold import TRANSPOSED, LayerCall, positions
from hawq_lightning.sensitivity._weight_gradients import by_kernel, weight_gradients

_CHUNK = 1 << 25  # elements of per-image gradients formed at a time


def inner_products(uses: Sequence[LayerCall], per_image: bool) -> torch.Tensor:
    """``<G_n, G'_n>`` for every row n, G the weight gradient from ``grad`` and G' from ``other`` (or ``grad`` again).

    Args:
        uses: all calls that share one weight; their gradients are added before the product.
        per_image: a row is an index of the first axis; otherwise all of the batch is one row.

    Returns:
        float64, one value a row.
    """
    filled = [u for u in uses if u.grad.numel()]  # a head for objects may get none
    if not filled:
        return uses[0].grad.new_zeros(len(uses[0].grad) if per_image else 1, dtype=torch.float64)
    uses = filled
    ghost, kernel = _how(uses, per_image)
    if not ghost and kernel:
        pairs = weight_gradients(uses, per_image)
    else:
        sides = [positions(use, per_image) for use in uses]
        u, d, e = (torch.cat(x, -1) if len(x) > 1 else x[0] for x in zip(*sides))
        if ghost:
            return row_dots(torch.matmul(u.mT, u), torch.matmul(d.mT, e))
        pairs = _products(u, d, None if all(use.other is None for use in uses) else e)
    return torch.cat([row_dots(g, h) for g, h in pairs])


def row_dots(g: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
    """``<g_n, h_n>`` over the first axis, float64; summed in pairs in the tensors' precision, at least float32."""
    g, h = (x.flatten(1).to(torch.promote_types(x.dtype, torch.float32)) for x in (g, h))
    return torch.linalg.vecdot(g, h).double()


def _how(uses: Sequence[LayerCall], per_image: bool) -> tuple[bool, bool]:
    """Whether Gram matrices are less work than gradients, and whether the kernel should make the gradients."""
    layer, weight = uses[0].layer, uses[0].layer.weight
    assert isinstance(weight, torch.Tensor)
    if layer_type(layer) is nn.Linear:
        c, k = weight.shape
        groups, t = 1, sum(u.grad.numel() // c for u in uses)
    else:
        transposed = issubclass(layer_type(layer), TRANSPOSED)
        groups = int(layer.groups)  # type: ignore[arg-type]
        c, k = weight.shape[0] // groups, weight[0].numel()
        t = sum((u.read if transposed else u.grad).numel() // weight.shape[0] for u in uses)
    images = 1 if uses[0].grad.ndim < weight.ndim else uses[0].grad.shape[0]
    t = t // images if per_image else t
    return t * (k + c) < k * c, by_kernel(layer, t * k * groups)


def _products(u: torch.Tensor, d: torch.Tensor, e: torch.Tensor | None) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    rows, groups, k, _ = u.shape
    step = max(1, _CHUNK // (groups * k * d.shape[2]))
    for start in range(0, rows, step):
        part = slice(start, start + step)
        g = torch.matmul(d[part], u[part].mT)
        yield g, g if e is None else torch.matmul(e[part], u[part].mT)
