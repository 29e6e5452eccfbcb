"""A lower bound on Ω for plans under one cap, so that a sweep for a single budget drops what cannot win any more.

For any price λ >= 0, a plan that costs at most ``cap`` has Ω >= Σ min(Ω + λ·cost) - λ·cap. Near the best price this is
tight, and what the price picks, improved greedily, is a good plan to beat.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hawq_lightning.selection._pareto import Block, Floats

_SLACK = 1e-9  # relative: rounding must never drop the best plan


@dataclass(frozen=True)
class LagrangianBound:
    """Lower bounds for partial plans, by block in the order of the sweep.

    Attributes:
        prices: several λ around the best one.
        rest: ``[blocks + 1, prices]``: Σ min(Ω + λ·cost) over the blocks still to come.
        cap: what a plan may cost.
        incumbent: Ω of a plan that fits.
    """

    prices: Floats
    rest: Floats
    cap: float
    incumbent: float

    def can_improve(self, k: int, cost: Floats, omega: Floats) -> np.ndarray:
        """Which partial plans over the first ``k`` blocks can still be as good as the incumbent."""
        low = omega.copy()
        for price, rest in zip(self.prices, self.rest[k]):
            np.maximum(low, omega + (rest - price * (self.cap - cost)), out=low)
        out: np.ndarray = low <= self.incumbent * (1 + _SLACK)
        return out


def lagrangian_bound(blocks: Sequence[Block], cost: float, omega: float, cap: float) -> LagrangianBound | None:
    """The bound for blocks that come on top of a cost and an Ω; None when not even the cheapest plan fits.

    Args:
        blocks: pruned: ascending in cost, descending in Ω.
        cost: of what is decided.
        omega: of what is decided.
        cap: on the total cost.
    """
    width = max(len(b.cost) for b in blocks)
    c = np.stack([np.pad(b.cost, (0, width - len(b.cost)), constant_values=math.inf) for b in blocks])
    o = np.stack([np.pad(b.omega, (0, width - len(b.omega)), constant_values=math.inf) for b in blocks])
    usable = np.isfinite(c)
    finite = np.where(usable, c, 0.0)  # 0 · inf has no value
    at = np.arange(len(blocks))

    def picked(price: float) -> np.ndarray:
        options: np.ndarray = np.argmin(o + price * finite, axis=1)
        return options

    if cost + math.fsum(c[:, 0]) > cap:
        return None
    low, high = (
        0.0,
        (float(o[:, 0].max()) + 1e-300) / max(float((c[:, -1][np.isfinite(c[:, -1])]).max(initial=1.0)), 1e-300),
    )
    while cost + c[at, picked(high)].sum() > cap and high < 1e290:
        low, high = high, high * 8
    for _ in range(50):
        middle = math.sqrt(low * high) if low > 0 else high / 1024
        if low > 0 and high / low < 1 + 1e-9:
            break
        if cost + c[at, picked(middle)].sum() > cap:
            low = middle
        else:
            high = middle
        if high < 1e-290:
            break
    k = picked(high)
    if cost + c[at, k].sum() > cap:
        k = np.zeros(len(blocks), dtype=np.int64)
    for _ in range(4 * len(blocks)):  # spend what is left where it helps most
        slack = cap - cost - c[at, k].sum()
        gain = np.where(c - c[at, k][:, None] <= slack, o[at, k][:, None] - o, -math.inf)
        b, j = np.unravel_index(int(np.argmax(gain)), gain.shape)
        if not gain[b, j] > 0:
            break
        k[b] = j
    prices = np.asarray([low, *(high * f for f in (0.5, 0.8, 1.0, 1.25, 2.0))])
    each = np.stack([(o + p * finite).min(axis=1) for p in prices], axis=1)
    rest = np.append(np.cumsum(each[::-1], axis=0)[::-1], np.zeros((1, len(prices))), axis=0)
    return LagrangianBound(prices, rest, cap, omega + math.fsum(o[at, k]))
