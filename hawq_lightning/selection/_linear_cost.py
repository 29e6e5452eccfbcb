"""A cost as a linear function of one-hot choices: what the sweep and the integer program both understand."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from hawq_lightning.selection._pareto import Floats


@dataclass(frozen=True)
class LinearCost:
    """One linear row: a constant, a table by group of tied sites, and a table by coupled pair of groups.

    Attributes:
        constant: what every plan pays.
        unary: by group, ``[bits of the group]``.
        pairs: (weight group, activation group) -> ``[weight bits, activation bits]``, or two activation groups that
            attention multiplies; both groups have a choice.
    """

    constant: float
    unary: tuple[Floats, ...]
    pairs: dict[tuple[int, int], Floats]

    def change(self, choice: Sequence[int], group: int, to: int) -> float:
        """How much the cost grows when one group moves to position ``to``."""
        growth = float(self.unary[group][to] - self.unary[group][choice[group]])
        for (w, a), table in self.pairs.items():
            if group == w:
                growth += float(table[to, choice[a]] - table[choice[w], choice[a]])
            elif group == a:
                growth += float(table[choice[w], to] - table[choice[w], choice[a]])
        return growth

    def __call__(self, choice: Sequence[int]) -> float:
        """The cost of a choice, the position in its bits for every group."""
        parts = [self.constant, *(float(u[k]) for u, k in zip(self.unary, choice))]
        parts += [float(table[choice[w], choice[a]]) for (w, a), table in self.pairs.items()]
        return math.fsum(parts)


def largest(rows: Sequence[LinearCost], choice: Sequence[int]) -> float:
    """The cost of a choice under several rows: a peak is the largest of them."""
    return max(row(choice) for row in rows)
