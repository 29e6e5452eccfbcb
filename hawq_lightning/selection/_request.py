"""What a selector is asked, and the exact solvers that they share."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hawq_lightning._errors import HawqError
from hawq_lightning._plan import Plan
from hawq_lightning.selection._budget import Bound
from hawq_lightning.selection._costs import Linear, eight_bit_cost, float_cost
from hawq_lightning.selection._coupling import can_sweep, group_frontier
from hawq_lightning.selection._frontier import Floats
from hawq_lightning.selection._milp import solve
from hawq_lightning.selection._monotone import monotone_frontier
from hawq_lightning.selection._problem import Problem

SLACK = 1e-12  # relative, for limits that are the result of a division


@dataclass
class Request:
    """One question to a selector.

    Attributes:
        problem: what to choose from.
        bounds: limits on costs; empty for selectors that need none.
        seed: for the random ones.
        eigenvalues: top Hessian eigenvalue by site name.
        measure_loss: loss of a plan, measured.
        bits: of a manual plan: site name -> bits, or a file.
        notes: what the selector wants remembered in the plan's settings.
    """

    problem: Problem
    bounds: tuple[Bound, ...]
    seed: int = 0
    eigenvalues: Mapping[str, float] | None = None
    measure_loss: Callable[[Plan], float] | None = None
    bits: Mapping[str, int] | str | Path | None = None
    notes: dict[str, Any] = field(default_factory=dict)

    @property
    def limits(self) -> list[tuple[Linear, float]]:
        """Every row of every bounded cost with its limit."""
        return [(row, b.limit * (1 + SLACK)) for b in self.bounds for row in self.problem.cost(b.cost)]

    def fits(self, choice: Sequence[int]) -> bool:
        """Whether a choice meets all budgets and the device's pairs."""
        return self.problem.pairs_fit(choice) and all(row(choice) <= limit for row, limit in self.limits)

    def least(self, scores: Sequence[Floats] | None = None, order: Sequence[Sequence[int]] = ()) -> list[int]:
        """The choice with the least score that fits, exactly; one linear budget by the sweep, several by the program.

        Args:
            scores: instead of Ω, by group.
            order: chains of groups along which bits may not fall.

        Raises:
            HawqError: no plan fits; the message has the cheapest one for every budget.
        """
        limits, problem = self.limits, self.problem
        if len(limits) == 1:
            row, limit = limits[0]
            if order and not row.pairs and not problem.masks:
                kind = 1 if not any(any(row.unary[g]) for g in order[0]) and len(order) > 1 else 0
                front = monotone_frontier(problem, row, order[kind], scores, cap=limit)
                if len(front):
                    return front.choice(len(front) - 1)
                raise HawqError(infeasible(self, order))
            if not order and can_sweep(problem, row):
                swept = group_frontier(problem, row, scores, cap=limit, last=True)
                if not len(swept):
                    raise HawqError(infeasible(self))
                if swept.factor == 1:
                    return swept.options(len(swept) - 1)
        choice = solve(problem, limits, scores=scores, order=order)
        if choice is None:
            raise HawqError(infeasible(self, order))
        return choice


def cheapest(
    request: Request, bound: Bound, others: Sequence[Bound] = (), order: Sequence[Sequence[int]] = ()
) -> float:
    """What the cheapest plan costs by one bound, ``inf`` when no plan meets the others."""
    problem = request.problem
    rows = problem.cost(bound.cost)
    limits = [(row, b.limit * (1 + SLACK)) for b in others for row in problem.cost(b.cost)]
    if len(rows) == 1:
        choice = solve(problem, limits, objective=rows[0], order=order)
        return math.inf if choice is None else rows[0](choice)
    # a peak: find the lowest limit on all rows by bisection, then what that plan really has
    low, high, best = 0.0, problem.cost_of(bound.cost, [len(g.bits) - 1 for g in problem.groups]), math.inf
    for _ in range(40):
        limit = high if best == math.inf else (low + high) / 2
        choice = solve(problem, [*limits, *((row, limit) for row in rows)], order=order)
        if choice is None:
            if best == math.inf:
                return math.inf
            low = limit
        else:
            high = best = problem.cost_of(bound.cost, choice)
        if high - low <= 1e-9 * high:
            break
    return best


def infeasible(request: Request, order: Sequence[Sequence[int]] = ()) -> str:
    """One sentence: which budget cannot be met, and the cheapest plan by each."""
    problem, bounds = request.problem, request.bounds
    alone = {b: cheapest(request, b, order=order) for b in bounds}
    if all(math.isinf(v) for v in alone.values()):
        return "No plan exists at all: the device's pairs and tables leave no common choice."
    broken = [b for b, v in alone.items() if v > b.limit * (1 + SLACK)]
    if broken:
        parts = [
            f"budget {b.text!r} cannot be met: the smallest plan is {shown(problem, b.cost, alone[b])}" for b in broken
        ]
        parts += [
            f"budget {b.text!r} alone can: its smallest plan is {shown(problem, b.cost, alone[b])}"
            for b in bounds
            if b not in broken
        ]
    else:
        parts = ["these budgets cannot be met together"]
        for b in bounds:
            value = cheapest(request, b, [x for x in bounds if x is not b], order)
            given = "no plan meets the others" if math.isinf(value) else f"at least {shown(problem, b.cost, value)}"
            parts.append(f"{b.text!r} needs {given} under the others and {shown(problem, b.cost, alone[b])} alone")
    if order and solve(problem, request.limits) is not None:
        parts.append("this selector keeps bits in an order; 'pareto' can meet the budget")
    text = "; ".join(parts) + "."
    return text[0].upper() + text[1:]


def shown(problem: Problem, cost: str, value: float) -> str:
    """A cost in the units that budgets use."""
    if math.isinf(value):
        return "none"
    if cost == "latency_ms":
        return f"{_up(value)} ms"
    if cost == "bops":
        return f"{_up(value / 1e6)}M BOPs = {_up(100 * value / eight_bit_cost(problem, cost))}%"
    if cost.endswith("_bytes"):
        text = _bytes(value, ("MiB", 2**20), ("KiB", 2**10))
        if cost == "file_bytes":  # where MB and MiB both occur
            return text if value < 1000 else f"{_bytes(value, ('MB', 10**6), ('kB', 10**3))} = {text}"
        return f"{text} = {math.floor(100 * float_cost(problem, cost) / value) / 100:g}x"
    return _up(value)


def _up(value: float) -> str:
    """Four digits, rounded up, so that the figure can be given back as a budget."""
    digits = max(0, 3 - math.floor(math.log10(value))) if value > 0 else 0
    return f"{math.ceil(value * 10**digits * (1 - 1e-12)) / 10**digits:.{digits}f}"


def _bytes(value: float, *units: tuple[str, int]) -> str:
    unit, size = next(((u, k) for u, k in units if value >= k), ("B", 1))
    return f"{math.ceil(value) if size == 1 else _up(value / size)} {unit}"
