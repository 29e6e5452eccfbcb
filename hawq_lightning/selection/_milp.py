"""Several budgets at once, exactly: a small mixed-integer program for HiGHS.

One-hot x for every group's bits; for coupled groups a continuous y for every pair, whose margins are the x (with
binary x these y can only be products). HiGHS stops at a relative gap of 1e-4 unless told otherwise, and at an absolute
gap that SciPy does not expose: so the gap is set to 0 and the objective scaled until the optimum itself is around 1000.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array

from hawq_lightning._errors import HawqError
from hawq_lightning.selection._linear_cost import LinearCost
from hawq_lightning.selection._pareto import Floats
from hawq_lightning.selection._problem import Problem

_SCALE = 1e3
SECONDS = 300.0  # for one solve; seconds suffice for 300 sites under three budgets


@dataclass
class _Rows:
    """Sparse rows with bounds."""

    entries: list[tuple[int, int, float]] = field(default_factory=list)
    low: list[float] = field(default_factory=list)
    high: list[float] = field(default_factory=list)

    def add(self, terms: Sequence[tuple[int, float]], low: float, high: float) -> None:
        self.entries += [(len(self.low), j, v) for j, v in terms if v]
        self.low.append(low)
        self.high.append(high)


def solve(
    problem: Problem,
    limits: Sequence[tuple[LinearCost, float]] = (),
    *,
    scores: Sequence[Floats] | None = None,
    objective: LinearCost | None = None,
    floors: Sequence[tuple[LinearCost, float]] = (),
    order: Sequence[Sequence[int]] = (),
    maximize: bool = False,
) -> list[int] | None:
    """The choice with the least Ω (or other objective) under all limits, or None when there is none.

    Args:
        problem: the groups and the device's pairs.
        limits: rows with their upper limits.
        scores: what to minimise by group, instead of Ω.
        objective: a cost to minimise instead.
        floors: rows with lower limits.
        order: lists of groups along which bits may not fall (the paper's set B).
        maximize: the most instead of the least.

    Raises:
        HawqError: the solver failed.
    """
    target = objective if objective is not None else LinearCost(0.0, tuple(scores or problem.scores()), {})
    offsets = np.cumsum([0, *(len(g.bits) for g in problem.groups)])
    pairs = sorted(
        {key for row in (target, *(r for r, _ in (*limits, *floors))) for key in row.pairs} | set(problem.allowed_pairs)
    )
    shape = {(w, a): (len(problem.groups[w].bits), len(problem.groups[a].bits)) for w, a in pairs}
    at: dict[tuple[int, int], int] = {}
    count = int(offsets[-1])
    for key in pairs:
        at[key] = count
        count += shape[key][0] * shape[key][1]

    def flat(row: LinearCost) -> Floats:
        out = np.zeros(count)
        for g, unary in enumerate(row.unary):
            out[offsets[g] : offsets[g + 1]] = unary
        for key, table in row.pairs.items():
            out[at[key] : at[key] + table.size] = table.ravel()
        return out

    upper = np.ones(count)
    rows = _Rows()
    for g in range(len(problem.groups)):
        rows.add([(j, 1.0) for j in range(offsets[g], offsets[g + 1])], 1, 1)
    for (w, a), (n, m) in shape.items():
        first = at[w, a]
        for k in range(n):
            rows.add([(first + k * m + j, 1.0) for j in range(m)] + [(int(offsets[w]) + k, -1.0)], 0, 0)
        for j in range(m):
            rows.add([(first + k * m + j, 1.0) for k in range(n)] + [(int(offsets[a]) + j, -1.0)], 0, 0)
        if (w, a) in problem.allowed_pairs:
            upper[first : first + n * m][~problem.allowed_pairs[w, a].ravel()] = 0
    for chain in order:
        _add_order(problem, chain, offsets, rows)
    weights = flat(target)
    bounded = [(flat(r), -math.inf, limit - r.constant) for r, limit in limits]
    bounded += [(flat(r), limit - r.constant, math.inf) for r, limit in floors]
    for values, low, high in bounded:
        upper[~np.isfinite(values)] = 0
        largest = max(abs(x) for x in (low, high) if math.isfinite(x)) or 1.0
        # a row of a few thousand units, with slack that exact arithmetic checks afterwards
        unit = 1e4 / largest
        rows.add(
            [(int(j), float(values[j] * unit)) for j in np.flatnonzero(np.isfinite(values))],
            low * unit - 1e-7,
            high * unit + 1e-7,
        )
    upper[~np.isfinite(weights)] = 0
    weights = np.where(np.isfinite(weights), weights, 0.0)
    if maximize:
        weights = -weights
    return _run(
        problem,
        weights,
        upper,
        rows,
        int(offsets[-1]),
        offsets,
        list(limits),
        list(floors),
        len(rows.low) - len(bounded),
    )


def _run(
    problem: Problem,
    weights: Floats,
    upper: Floats,
    rows: _Rows,
    binary: int,
    offsets: np.ndarray,
    limits: list[tuple[LinearCost, float]],
    floors: list[tuple[LinearCost, float]],
    first_bounded: int,
) -> list[int] | None:
    i, j, v = zip(*rows.entries)
    places = np.array(i, np.int32), np.array(j, np.int32)  # scipy before 1.15 takes no wider ones
    matrix = coo_array((v, places), shape=(len(rows.low), len(upper))).tocsr()
    integrality = np.zeros(len(upper))
    integrality[:binary] = 1
    low, high = np.asarray(rows.low), np.asarray(rows.high)
    scale = _SCALE / (np.abs(weights).max() or 1.0)
    best: list[int] | None = None
    for _ in range(12):
        answer = milp(
            weights * scale,
            integrality=integrality,
            bounds=Bounds(np.zeros(len(upper)), upper),
            constraints=LinearConstraint(matrix, low, high),
            options={"mip_rel_gap": 0.0, "time_limit": SECONDS},
        )
        if answer.x is None and (answer.status in (2, 3) or "infeasible" in answer.message.lower()):
            return best
        if answer.x is None:
            raise HawqError(f"The integer program for these budgets could not be solved: {answer.message}")
        if answer.status == 1:
            warnings.warn(
                f"The integer program stopped after {SECONDS:.0f} s; its plan may be {answer.mip_gap:.1%} "
                "from the best.",
                stacklevel=2,
            )
        choice = [int(np.argmax(answer.x[offsets[g] : offsets[g + 1]])) for g in range(len(problem.groups))]
        broken = False
        for k, (row, limit) in enumerate((*limits, *floors)):
            over = row(choice) - limit if k < len(limits) else limit - row(choice)
            if over > 1e-9 * abs(limit):  # the solver used its tolerance: cut this plan off and ask again
                step = max(over, 1e-7 * abs(limit)) * 1e4 / (abs(limit) or 1.0)
                side, sign = (high, -1.0) if k < len(limits) else (low, 1.0)
                side[first_bounded + k] += sign * step * 0.5
                broken = True
        if broken:
            continue
        best = choice
        reached = float(abs(weights[:binary] @ _one_hot(choice, offsets)))
        if not 0 < reached * scale < _SCALE / 10 or (weights < 0).any():
            return best
        # the absolute gap is too coarse for so small an optimum: enlarge, and drop options that alone exceed it
        scale = _SCALE / reached
        upper = np.where(weights > reached * (1 + 1e-9), 0.0, upper)
        weights = np.where(upper > 0, weights, 0.0)
    return best


def _one_hot(choice: Sequence[int], offsets: np.ndarray) -> Floats:
    out = np.zeros(int(offsets[-1]))
    out[offsets[:-1] + np.asarray(choice)] = 1
    return out


def _add_order(problem: Problem, chain: Sequence[int], offsets: np.ndarray, rows: _Rows) -> None:
    for less, more in itertools.pairwise(chain):
        for width in sorted({*problem.groups[less].bits, *problem.groups[more].bits})[1:]:
            terms = [(int(offsets[less]) + k, 1.0) for k, b in enumerate(problem.groups[less].bits) if b >= width]
            terms += [(int(offsets[more]) + k, -1.0) for k, b in enumerate(problem.groups[more].bits) if b >= width]
            rows.add(terms, -math.inf, 0)
