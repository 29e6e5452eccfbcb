"""Weight gradients along given directions, a sample each, from the pass that gives their inner products.

What the second-order loss change of rounding needs: ``<G_n, D_w>`` with ``D_w = Q_w(W) - W`` for every width w. Where
the gradient is formed anyway, this takes one dot product a direction. Where it is not, since positions are few, it is
``<d_n, D_w u_n>``: the layer's forward pass with ``D_w`` in the place of its weight.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeAlias

import torch

from hawq_lightning.layers._directions import Directions
from hawq_lightning.layers._gradients import Pairs, gram_is_less, gram_products, row_dots

Part: TypeAlias = Callable[[slice], torch.Tensor]
"""From a range of channels to what directions are there."""

_FORMING = 8  # what writing and reading a gradient costs, in multiplications an element
_CACHED = 1 << 20  # elements of gradients formed at a time on a CPU; with fewer, products of few rows are slow
_CHUNK = 1 << 25  # and elsewhere; elements of directions at a time


@dataclass(frozen=True)
class ProjectedProducts:
    """Products of every row's gradients G and G', float64.

    Attributes:
        inner: ``<G_n, G'_n>``, (rows,).
        along: ``<G_n, D_w>``, (rows, directions).
        other: ``<G'_n, D_w>``; ``along`` itself where G' is G.
    """

    inner: torch.Tensor
    along: torch.Tensor
    other: torch.Tensor

    @property
    def squares(self) -> torch.Tensor:
        """``<G_n, D_w> <G'_n, D_w>``, (rows, directions)."""
        return self.along * self.other


def row_projections(g: torch.Tensor, directions: torch.Tensor) -> torch.Tensor:
    """``<g_n, D_w>`` (rows, directions), float64; summed in the gradient's precision, at least float32.

    Args:
        g: ``[rows, *shape]``.
        directions: ``[directions, *shape]``.
    """
    g = g.flatten(1).to(torch.promote_types(g.dtype, torch.float32))
    along: torch.Tensor = torch.matmul(g, directions.flatten(1).to(g).T)
    return along.double()


def projected_pairs(pairs: Pairs, directions: Directions) -> ProjectedProducts:
    """From the gradients themselves, as :meth:`LayerKind.weight_gradients` gives them.

    Args:
        pairs: G and G', some rows at a time.
        directions: of the gradients' shape.
    """
    few = _CHUNK // max(1, directions.shape.numel() // directions.shape[1]) or 1
    if few >= directions.shape[1]:
        whole = directions.whole()
        return _projected(pairs, lambda g: row_projections(g, whole))

    def by_rows(g: torch.Tensor) -> torch.Tensor:  # of a table of many words
        blocks = (slice(start, start + few) for start in range(0, directions.shape[1], few))
        return torch.stack([row_projections(g[:, b], directions.part(0, b)) for b in blocks]).sum(0)

    return _projected(pairs, by_rows)


def _projected(pairs: Pairs, project: Callable[[torch.Tensor], torch.Tensor]) -> ProjectedProducts:
    inner, along, other = [], [], []
    for g, h in pairs:
        inner.append(row_dots(g, h))
        along.append(project(g))
        other.append(along[-1] if h is g else project(h))
    first = torch.cat(along)
    return ProjectedProducts(torch.cat(inner), first, first if _same(along, other) else torch.cat(other))


def projected_factors(
    u: torch.Tensor, d: torch.Tensor, e: torch.Tensor | None, count: int, directions: Part
) -> ProjectedProducts:
    """Of gradients ``D U^T``, by whatever is less work.

    Args:
        u: ``[rows, groups, K, T]``.
        d: ``[rows, groups, C, T]``.
        e: D' of the same shape; ``None`` where it is D.
        count: of directions.
        directions: ``[directions, groups, C, K]``, of some C.
    """
    (groups, c), (k, positions) = d.shape[1:3], u.shape[2:]
    by_gram = gram_is_less(positions, c, k)
    # either way T C K multiplications make a gradient, or one direction's forward pass
    if not by_gram or positions + count + _FORMING < count * positions:
        formed = _by_blocks(u, d, e, directions)
        if not by_gram or positions**2 * (c + k) > _FORMING * c * k:
            return formed
        return replace(formed, inner=gram_products(u, d, d if e is None else e))
    step = max(1, _CHUNK // (count * groups * k))
    parts = []
    for start in range(0, c, step):
        block = slice(start, start + step)
        rows = directions(block).permute(1, 0, 2, 3).reshape(groups, -1, k).to(u)
        ahead = torch.matmul(rows, u).unflatten(2, (count, -1))
        parts.append([_along(ahead, x[:, :, block]) for x in ((d,) if e is None else (d, e))])
    sides = [side[0] if len(side) == 1 else torch.stack(side).sum(0) for side in zip(*parts)]
    inner = gram_products(u, d, d if e is None else e)
    return ProjectedProducts(inner, sides[0], sides[-1])


def _by_blocks(u: torch.Tensor, d: torch.Tensor, e: torch.Tensor | None, directions: Part) -> ProjectedProducts:
    """From gradients formed some channels at a time: each part is used up while it is in the cache."""
    samples, groups, c, _ = d.shape
    most = _CACHED if u.device.type == "cpu" else _CHUNK
    step = max(1, most // (samples * groups * u.shape[2]))
    parts = []
    for start in range(0, c, step):
        block = slice(start, start + step)
        g = torch.matmul(d[:, :, block], u.mT)
        h = g if e is None else torch.matmul(e[:, :, block], u.mT)
        project = partial(row_projections, directions=directions(block))
        parts.append(_projected(iter([(g, h)]), project))
    inner, along, other = (
        torch.stack([getattr(part, name) for part in parts]).sum(0) for name in ("inner", "along", "other")
    )
    return ProjectedProducts(inner, along, along if e is None else other)


def _along(ahead: torch.Tensor, d: torch.Tensor) -> torch.Tensor:
    """``<d_n, ahead_nw>``: over groups, channels and positions."""
    wide = torch.promote_types(d.dtype, torch.float32)
    return torch.einsum("ngwct,ngct->nw", ahead.to(wide), d.to(wide)).double()


def _same(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return all(a is b for a, b in zip(first, second))
