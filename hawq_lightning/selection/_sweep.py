"""The exact frontier of a separable problem under one cost, by dynamic programming with dominance pruning.

Nemhauser and Ullmann's sweep: take one block of tied sites after another, add each of its options to every point found
so far, and keep the points that no other beats in both cost and Ω. Worst case exponential, in practice tens of
thousands of points; should it explode, points are thinned and the frontier says by which factor Ω may exceed the
optimum.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hawq_lightning._errors import HawqError
from hawq_lightning.selection._checks import MOST_OMEGA
from hawq_lightning.selection._lagrangian_bound import lagrangian_bound
from hawq_lightning.selection._pareto import MAX_POINTS, Block, Floats, Ints, connected_groups, minima

_LARGE = 1e100  # Ω beyond which products with prices may overflow


@dataclass(frozen=True)
class Frontier:
    """Every plan that no other beats in both cost and Ω.

    Attributes:
        cost: ascending.
        omega: descending.
        factor: 1.0 where exact; else, for every plan there is a point that costs no more and whose Ω is at most
            ``factor`` times larger.
    """

    cost: Floats
    omega: Floats
    factor: float
    _blocks: tuple[Block, ...]  # blocks with one option left come first and have no stage
    _stages: tuple[tuple[NDArray[np.int32], NDArray[np.int32]], ...]  # (parent, option) of every point
    _sites: int

    def __len__(self) -> int:
        return len(self.cost)

    def options(self, i: int) -> list[int]:
        """The option index of every site at point ``i``; negative ``i`` counts from the most expensive one."""
        return [int(x) for x in self.table(np.asarray([i]))[0]]

    def table(self, points: ArrayLike | None = None) -> Ints:
        """``[points, sites]`` option indices of the given points, of all by default."""
        at = np.arange(len(self)) if points is None else np.asarray(points, dtype=np.int64)
        if at.size and (at.min() < -len(self) or at.max() >= len(self)):
            raise HawqError(f"The frontier has points 0 to {len(self) - 1}, not {int(at.max())}.")
        at = np.asarray(at % max(len(self), 1), dtype=np.int64)
        out = np.zeros((len(at), self._sites), dtype=np.int64)
        alone = len(self._blocks) - len(self._stages)
        for block in self._blocks[:alone]:
            out[:, block.members] = block.rows[0]
        for block, (parent, option) in zip(reversed(self._blocks[alone:]), reversed(self._stages)):
            out[:, block.members] = block.rows[option[at]]
            at = parent[at].astype(np.int64)
        return out

    def best(self, budget: float) -> int:
        """The point with the least Ω that costs no more than ``budget``.

        Raises:
            HawqError: even the cheapest point costs more.
        """
        i = int(np.searchsorted(self.cost, budget, side="right")) - 1
        if i < 0:
            raise HawqError(f"A budget of {budget:.6g} cannot be met: the cheapest plan costs {self.cost[0]:.6g}.")
        return i


def frontier(
    omega: Any, cost: Any, ties: Sequence[Sequence[int]] | None = None, *, max_points: int = MAX_POINTS
) -> Frontier:
    """Find every plan that no other plan beats in both Ω and cost (paper section 2.3, Fig. 4).

    Args:
        omega: sites x options, Ω of every choice (any unit, >= 0); ``inf`` means not available. Rows may have different
            lengths.
        cost: what every choice costs, of omega's shape, in any unit, not negative.
        ties: lists of site indices that take one option; lists that share a site become one.
        max_points: points kept at most between two steps; beyond, :attr:`Frontier.factor` exceeds 1.

    Raises:
        HawqError: NaN or negative numbers, a site without an option or without a cost, ties that leave no option.
    """
    o, c = _matrix(omega, "omega"), _matrix(cost, "cost")
    if o.shape != c.shape:
        raise HawqError(f"omega has shape {list(o.shape)} and cost {list(c.shape)}; they must agree.")
    if not len(o):
        raise HawqError("There are no sites to choose for.")
    for what, table in (("omega", o), ("cost", c)):
        for i, j in np.argwhere(np.isnan(table) | (table < 0)):
            raise HawqError(
                f"{what} of site {i}, option {j} is {table[i, j]}; it must be a number >= 0 (inf: not available)."
            )
        for i, j in np.argwhere(np.isfinite(table) & (table > MOST_OMEGA)):
            raise HawqError(
                f"{what} of site {i}, option {j} is {table[i, j]:.3g}; more than {MOST_OMEGA:g} cannot be added up: "
                "give it in a larger unit."
            )
    usable = np.isfinite(o) & np.isfinite(c)
    for i in range(len(o)):
        if not usable[i].any():
            raise HawqError(f"Site {i} has no available option: every omega or cost is inf.")
        if not c[i, usable[i]].any():
            raise HawqError(f"Site {i} costs nothing whatever its option, so there is nothing to trade; leave it out.")
    blocks = []
    for group in connected_groups(len(o), ties or ()):
        both = usable[group].all(axis=0)
        if not both.any():
            raise HawqError(f"The tied sites {group} conflict: no option is available to all of them.")
        rows = np.repeat(np.arange(o.shape[1])[:, None], len(group), axis=1)
        blocks.append(Block(tuple(group), rows, c[group].sum(axis=0), o[group].sum(axis=0)))
    return sweep(blocks, len(o), max_points=max_points)


def sweep(
    blocks: Sequence[Block],
    sites: int,
    *,
    start: float = 0.0,
    cap: float = math.inf,
    last: bool = False,
    max_points: int = MAX_POINTS,
) -> Frontier:
    """The frontier of independent blocks that together cover ``sites`` sites.

    Args:
        blocks: each with at least one available option.
        sites: how many sites the blocks' members index.
        start: a cost that every plan has.
        cap: forget plans that cost more.
        last: only the last point, the best plan under the cap, is wanted; of the others some may be missing.
        max_points: see :func:`frontier`.
    """
    if max_points < 2:
        raise HawqError(f"max_points is {max_points}; the frontier needs at least 2.")
    blocks, unit = _in_range(blocks)
    small = [b.pruned() for b in blocks]
    alone = [b for b in small if len(b.cost) == 1]
    # largest first: early points then spread over the whole range, and small blocks fill in
    rest = sorted((b for b in small if len(b.cost) > 1), key=lambda b: -(b.cost[-1] - b.cost[0]))
    costs = np.asarray([start + math.fsum(b.cost[0] for b in alone)])
    omegas = np.asarray([math.fsum(b.omega[0] for b in alone)])
    # what the blocks still to come cost at least
    min_cost = np.append(np.cumsum([b.cost[0] for b in reversed(rest)])[::-1], 0.0)
    bound = lagrangian_bound(rest, costs[0], omegas[0], cap) if last and rest else None
    stages, factor = [], 1.0
    for k, block in enumerate(rest):
        s = (block.cost[:, None] + costs).ravel()
        o = (block.omega[:, None] + omegas).ravel()
        at = np.arange(len(s)) if cap == math.inf else np.flatnonzero(s <= cap - min_cost[k + 1])
        if bound is not None:
            at = at[bound.can_improve(k + 1, s[at], o[at])]
        at = at[minima(s[at], o[at])]
        at, grown = _thin(at, o, max_points)
        factor *= grown
        option, parent = np.divmod(at, max(len(costs), 1))
        stages.append((parent.astype(np.int32), option.astype(np.int32)))
        costs, omegas = s[at], o[at]
    if not rest and costs[0] > cap:
        costs, omegas = costs[:0], omegas[:0]
    return Frontier(costs, omegas * unit, factor, (*alone, *rest), tuple(stages), sites)


def _in_range(blocks: Sequence[Block]) -> tuple[Sequence[Block], float]:
    """Blocks whose Ω can be multiplied by prices without overflow, and the power of two that was divided by."""
    largest = max(float(np.max(b.omega, where=np.isfinite(b.omega), initial=0.0)) for b in blocks)
    if largest <= _LARGE:
        return blocks, 1.0
    unit = math.ldexp(1.0, math.frexp(largest)[1])
    return [Block(b.members, b.rows, b.cost, b.omega / unit) for b in blocks], unit


def _thin(at: Ints, omega: Floats, max_points: int) -> tuple[Ints, float]:
    """At most ``max_points`` of the points ``at`` (ascending cost), and the factor by which Ω may have grown.

    In every bucket of Ω that is (1+δ) wide the cheapest point stays, so costs never grow.
    """
    if len(at) <= max_points:
        return at, 1.0
    positive = at[omega[at] > 0]
    logs = np.log(omega[positive])

    def heads(width: float) -> NDArray[np.bool_]:
        bucket = np.floor(logs / width)
        return np.append(True, bucket[1:] != bucket[:-1])

    low, high = 0.0, max(float(logs[0] - logs[-1]), 1e-12) * 2
    goal = max(max_points // 2, 1)
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if heads(middle).sum() <= goal else (middle, high)
    kept = heads(high)
    grown = (logs[kept][np.cumsum(kept) - 1] - logs).max()  # what dropped points really lost
    return np.concatenate([positive[kept], at[omega[at] <= 0]]), math.exp(grown) * (1 + 1e-12)


def _matrix(values: Any, what: str) -> Floats:
    try:
        rows = [np.asarray(row, dtype=np.float64).reshape(-1) for row in values]
    except (TypeError, ValueError) as error:
        raise HawqError(f"{what} must be sites x options of numbers: {error}.") from error
    width = max((len(r) for r in rows), default=0)
    return np.asarray([np.pad(r, (0, width - len(r)), constant_values=np.inf) for r in rows]).reshape(len(rows), width)
