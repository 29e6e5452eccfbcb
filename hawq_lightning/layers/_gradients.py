"""Weight gradients as products, and their inner products, a sample each.

Where the gradient of sample n is ``D_n U_n^T``, with U what the layer multiplied its weight with and D the gradient at
its output over T positions, and T is small, ``<G_n, G'_n>`` comes from two T x T Gram matrices ("ghost norms", Bu et
al., arXiv:2205.10683); otherwise from the gradient itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeAlias

import torch

Pairs: TypeAlias = Iterator[tuple[torch.Tensor, torch.Tensor]]
Factors: TypeAlias = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""U ``[rows, groups, K, T]``, D and D' ``[rows, groups, C, T]``, with G = D U^T."""

_CHUNK = 1 << 25  # elements of per-sample gradients formed at a time


def row_dots(g: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
    """``<g_n, h_n>`` over the first axis, float64; summed in pairs in the tensors' precision, at least float32."""
    g, h = (x.flatten(1).to(torch.promote_types(x.dtype, torch.float32)) for x in (g, h))
    dots: torch.Tensor = torch.linalg.vecdot(g, h)
    return dots.double()


def as_one_row(factors: Factors) -> Factors:
    """Factors of the gradient that is summed over the samples: their positions side by side."""
    u, d, e = (x.permute(1, 2, 0, 3).reshape(1, x.shape[1], x.shape[2], -1) for x in factors)
    return u, d, e


def joined(sides: list[Factors]) -> Factors:
    """Factors of the sum of some calls' gradients."""
    u, d, e = (torch.cat(x, -1) if len(x) > 1 else x[0] for x in zip(*sides))
    return u, d, e


def gram_products(u: torch.Tensor, d: torch.Tensor, e: torch.Tensor) -> torch.Tensor:
    """``<D_n U_n^T, D'_n U_n^T>`` by Gram matrices of positions."""
    return row_dots(torch.matmul(u.mT, u), torch.matmul(d.mT, e))


def gram_is_less(positions: int, rows: int, columns: int) -> bool:
    """Whether Gram matrices of T positions are less work than gradients of ``rows`` x ``columns``."""
    return positions * (columns + rows) < columns * rows


def products(u: torch.Tensor, d: torch.Tensor, e: torch.Tensor | None) -> Pairs:
    """The gradients, ``[rows, groups, C, K]``, some rows at a time; ``e`` is ``None`` where D' is D."""
    rows, groups, k, _ = u.shape
    step = max(1, _CHUNK // (groups * k * d.shape[2]))
    for start in range(0, rows, step):
        part = slice(start, start + step)
        g = torch.matmul(d[part], u[part].mT)
        yield g, g if e is None else torch.matmul(e[part], u[part].mT)
