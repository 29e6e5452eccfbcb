"""Weight gradients along given directions, a sample each, from the pass that gives their inner products.

What the second-order loss change of rounding needs: ``<G_n, D_w>`` with ``D_w = Q_w(W) - W`` for every width w. Where
the gradient is formed anyway, this takes one dot product a direction. Where it is not, since positions are few, it is
``<d_n, D_w u_n>``: the layer's forward pass with ``D_w`` in the place of its weight.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from hawq_lightning.layers._gradients import Pairs, gram_is_less, gram_products, row_dots

_FORMING = 8  # what writing and reading a gradient costs, in multiplications an element
_CACHED = 1 << 18  # elements of gradients formed at a time on a CPU
_CHUNK = 1 << 25  # and elsewhere


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


def projected_pairs(pairs: Pairs, directions: torch.Tensor) -> ProjectedProducts:
    """From the gradients themselves, as :meth:`LayerKind.weight_gradients` gives them.

    Args:
        pairs: G and G', some rows at a time.
        directions: ``[directions, *shape]`` of one gradient.
    """
    inner, along, other = [], [], []
    for g, h in pairs:
        inner.append(row_dots(g, h))
        along.append(row_projections(g, directions))
        other.append(along[-1] if h is g else row_projections(h, directions))
    first = torch.cat(along)
    return ProjectedProducts(torch.cat(inner), first, first if _same(along, other) else torch.cat(other))


def projected_factors(
    u: torch.Tensor, d: torch.Tensor, e: torch.Tensor | None, directions: torch.Tensor
) -> ProjectedProducts:
    """Of gradients ``D U^T``, by whatever is less work.

    Args:
        u: ``[rows, groups, K, T]``.
        d: ``[rows, groups, C, T]``.
        e: D' of the same shape; ``None`` where it is D.
        directions: ``[directions, groups, C, K]``.
    """
    (count, groups, c, k), positions = directions.shape, u.shape[-1]
    by_gram = gram_is_less(positions, c, k)
    # either way T C K multiplications make a gradient, or one direction's forward pass
    if not by_gram or positions + count + _FORMING < count * positions:
        formed = _by_blocks(u, d, e, directions)
        if not by_gram or positions**2 * (c + k) > _FORMING * c * k:
            return formed
        return replace(formed, inner=gram_products(u, d, d if e is None else e))
    rows = directions.permute(1, 0, 2, 3).reshape(groups, count * c, k).to(u)
    ahead = torch.matmul(rows, u).view(len(u), groups, count, c, positions)
    along = _along(ahead, d)
    inner = gram_products(u, d, d if e is None else e)
    return ProjectedProducts(inner, along, along if e is None else _along(ahead, e))


def _by_blocks(u: torch.Tensor, d: torch.Tensor, e: torch.Tensor | None, directions: torch.Tensor) -> ProjectedProducts:
    """From gradients formed some channels at a time: each part is used up while it is in the cache."""
    samples, groups, c, _ = d.shape
    most = _CACHED if u.device.type == "cpu" else _CHUNK
    step = max(1, most // (samples * groups * u.shape[2]))
    parts = []
    for start in range(0, c, step):
        block = slice(start, start + step)
        g = torch.matmul(d[:, :, block], u.mT)
        h = g if e is None else torch.matmul(e[:, :, block], u.mT)
        parts.append(projected_pairs(iter([(g, h)]), directions[:, :, block]))
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
