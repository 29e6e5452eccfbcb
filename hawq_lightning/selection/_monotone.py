"""The paper's admissible set B: bits never fall as the mean trace rises (section 2.3, Appendix B)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence

import numpy as np

from hawq_lightning._errors import HawqError
from hawq_lightning.selection._linear_cost import LinearCost
from hawq_lightning.selection._pareto import Floats, minima
from hawq_lightning.selection._problem import Problem


def set_b_size(layers: int, widths: int) -> int:
    """``|B| = C(L + k - 1, k - 1)`` for ``L`` layers that may all take ``k`` widths."""
    if layers < 1 or widths < 1:
        raise HawqError(f"|B| needs at least one layer and one width, not {layers} and {widths}.")
    return math.comb(layers + widths - 1, widths - 1)


def set_b(layers: int, bits: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """Every member of B: bits by layer, in ascending order of mean trace."""
    return itertools.combinations_with_replacement(sorted(set(bits)), layers)


def trace_order(problem: Problem, ranks: Sequence[float] | None = None) -> list[list[int]]:
    """Groups with a choice, weights and activations apart, ascending in mean trace; equal values in network order.

    Args:
        problem: with its sensitivity.
        ranks: another number by group to order by (HAWQ's first version: top eigenvalue / elements).
    """
    values = list(ranks if ranks is not None else problem.mean_traces())
    free = [g for g, group in enumerate(problem.groups) if len(group.bits) > 1]
    kinds = ("weight", "activation")
    return [sorted((g for g in free if problem.groups[g].kind == k), key=lambda g: values[g]) for k in kinds]


class MonotoneFrontier:
    """The Pareto frontier of set B.

    Attributes:
        cost: ascending.
        omega: descending.
    """

    def __init__(
        self,
        cost: Floats,
        omega: Floats,
        nodes: np.ndarray,
        tree: tuple[np.ndarray, np.ndarray],
        fixed: dict[int, int],
        chain: Sequence[int],
    ) -> None:
        self.cost, self.omega = cost, omega
        self._nodes, self._tree, self._fixed, self._chain = nodes, tree, fixed, chain

    def __len__(self) -> int:
        return len(self.cost)

    def choice(self, i: int) -> list[int]:
        """The choice at point ``i``, the position in ``bits`` for every group."""
        out = dict(self._fixed)
        node = int(self._nodes[i])
        parent, option = self._tree
        for g in reversed(self._chain):
            out[g] = int(option[node])
            node = int(parent[node])
        return [out[g] for g in range(len(out))]


def monotone_frontier(
    problem: Problem,
    row: LinearCost,
    chain: Sequence[int],
    scores: Sequence[Floats] | None = None,
    *,
    cap: float = math.inf,
) -> MonotoneFrontier:
    """The exact frontier of B under one cost without couplings: the sweep with the last bits as its state.

    Groups outside ``chain`` take their least Ω (their least cost where that ties).

    Raises:
        HawqError: the cost or the device couples groups, or more points than the problem allows.
    """
    if row.pairs or problem.allowed_pairs:
        raise HawqError(
            "The frontier of set B needs a cost without couplings; several budgets go through the integer program."
        )
    omega = list(scores if scores is not None else problem.scores())
    fixed = {g: int(np.lexsort((row.unary[g], omega[g]))[0]) for g in range(len(problem.groups)) if g not in set(chain)}
    base = row.constant + math.fsum(float(row.unary[g][k]) for g, k in fixed.items())
    min_cost = np.append(np.cumsum([row.unary[g].min() for g in reversed(chain)])[::-1], 0.0)
    shift = math.fsum(float(omega[g][k]) for g, k in fixed.items())
    # state: bits of the last group -> (cost, Ω, node); a node is a point of the tree of decisions
    states: dict[int, tuple[Floats, Floats, np.ndarray]] = {
        0: (np.array([base]), np.array([shift]), np.array([0], dtype=np.int64))
    }
    parents, options = [np.array([-1])], [np.array([-1])]
    count = 1
    for depth, g in enumerate(chain):
        merged: tuple[Floats, Floats, np.ndarray] | None = None
        waiting = sorted(states)
        fresh: dict[int, tuple[Floats, Floats, np.ndarray]] = {}
        for k, width in enumerate(problem.groups[g].bits):
            while waiting and waiting[0] <= width:
                merged = _join(merged, states[waiting.pop(0)])
            if merged is None or not math.isfinite(row.unary[g][k] + omega[g][k]):
                continue
            c, o = merged[0] + row.unary[g][k], merged[1] + omega[g][k]
            fits = c <= cap - min_cost[depth + 1]
            if not fits.any():
                continue
            parents.append(merged[2][fits])
            options.append(np.full(int(fits.sum()), k))
            fresh[width] = (c[fits], o[fits], np.arange(count, count + int(fits.sum())))
            count += int(fits.sum())
        states = fresh
        if sum(len(s[0]) for s in states.values()) > 4 * problem.max_points:
            raise HawqError(f"The frontier of set B exceeds {4 * problem.max_points} points; use fewer widths.")
    end: tuple[Floats, Floats, np.ndarray] | None = None
    for state in states.values():
        end = _join(end, state)
    cost, total, nodes = end if end is not None else (np.array([]), np.array([]), np.array([], dtype=np.int64))
    return MonotoneFrontier(cost, total, nodes, (np.concatenate(parents), np.concatenate(options)), fixed, list(chain))


def _join(
    a: tuple[Floats, Floats, np.ndarray] | None, b: tuple[Floats, Floats, np.ndarray]
) -> tuple[Floats, Floats, np.ndarray]:
    if a is None:
        return b
    cost, omega, node = (np.concatenate(both) for both in zip(a, b))
    keep = minima(cost, omega)
    return cost[keep], omega[keep], node[keep]
