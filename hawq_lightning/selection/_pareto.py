"""Blocks of options that are chosen together, and the options that no other beats."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hawq_lightning._errors import HawqError

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

MAX_POINTS = 250_000
"""Points that a frontier keeps between two steps, 8 bytes each: 300 MB for 150 blocks at the most."""


@dataclass(frozen=True)
class Block:
    """Sites that are chosen together.

    Attributes:
        members: indices of the sites.
        rows: ``[options, members]``, for every joint option the option index of every member.
        cost: ``[options]``, added up over the members.
        omega: ``[options]``, Ω or another score, added up over the members.
    """

    members: tuple[int, ...]
    rows: Ints
    cost: Floats
    omega: Floats

    def pruned(self) -> Block:
        """Without unavailable and dominated options, ascending in cost."""
        cost, omega = np.asarray(self.cost, dtype=np.float64), np.asarray(self.omega, dtype=np.float64)
        usable = np.flatnonzero(np.isfinite(cost) & np.isfinite(omega))
        keep = usable[minima(cost[usable], omega[usable])]
        return Block(self.members, self.rows[keep], cost[keep], omega[keep])


def minima(cost: Floats, omega: Floats) -> Ints:
    """Indices of the points that no other beats, ascending in cost and strictly descending in Ω."""
    order = np.argsort(cost, kind="stable")  # timsort: the candidates are a few sorted runs
    o = omega[order]
    below = np.empty(len(o), dtype=bool)
    below[:1] = True
    np.less(o[1:], np.minimum.accumulate(o)[:-1], out=below[1:])
    order = order[below]
    c = cost[order]
    last = np.ones(len(c), dtype=bool)
    last[:-1] = c[1:] > c[:-1]  # of equal costs the last has the least Ω
    return order[last]


def connected_groups(sites: int, ties: Sequence[Sequence[int]]) -> list[list[int]]:
    """Merge ties that share a site; untied sites are groups of one. Groups come in the order of their first site."""
    root = list(range(sites))

    def find(i: int) -> int:
        while root[i] != i:
            i = root[i]
        return i

    for tie in ties:
        if isinstance(tie, str) or not isinstance(tie, Iterable):
            raise HawqError(f"A tie is a list of site indices, not {tie!r}.")
        for i in tie:
            if isinstance(i, bool) or not isinstance(i, (int, np.integer)) or not 0 <= i < sites:
                raise HawqError(f"A tie names site {i!r}; the sites are 0 to {sites - 1}.")
            a, b = find(int(tie[0])), find(int(i))
            root[max(a, b)] = min(a, b)
    groups: dict[int, list[int]] = {}
    for i in range(sites):
        groups.setdefault(find(i), []).append(i)
    return list(groups.values())
