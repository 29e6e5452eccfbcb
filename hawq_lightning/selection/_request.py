"""What a selector is asked, and the exact solvers that selectors share."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from hawq_lightning._errors import HawqError
from hawq_lightning._plan import Plan
from hawq_lightning.selection._budget import UpperLimit
from hawq_lightning.selection._costs import cost_of, cost_rows, format_cost
from hawq_lightning.selection._coupling import can_sweep, group_frontier
from hawq_lightning.selection._linear_cost import LinearCost
from hawq_lightning.selection._milp import solve
from hawq_lightning.selection._monotone import monotone_frontier
from hawq_lightning.selection._pareto import Floats
from hawq_lightning.selection._problem import Problem

SLACK = 1e-12  # relative, for limits that are the result of a division
Order = Sequence[Sequence[int]]


@dataclass(frozen=True)
class Request:
    """One question to a selector.

    Attributes:
        problem: what to choose from.
        upper_limits: on costs; empty for selectors that need none.
        seed: for the random ones.
        eigenvalues: top Hessian eigenvalue by site name.
        measure_loss: loss of a plan, measured.
        bits: of a manual plan: site name -> bits, or a file.
        trials: plans that a search may measure.
        notes: what the selector wants remembered in the plan's settings.
    """

    problem: Problem
    upper_limits: tuple[UpperLimit, ...]
    seed: int = 0
    eigenvalues: Mapping[str, float] | None = None
    measure_loss: Callable[[Plan], float] | None = None
    bits: Mapping[str, int] | str | Path | None = None
    notes: dict[str, object] = field(default_factory=dict)
    trials: int = 100

    @cached_property
    def limits(self) -> list[tuple[LinearCost, float]]:
        """Every row of every limited cost with its limit."""
        return [(row, u.limit * (1 + SLACK)) for u in self.upper_limits for row in cost_rows(self.problem, u.cost)]

    def fits(self, choice: Sequence[int]) -> bool:
        """Whether a choice meets all budgets and the device's pairs."""
        return self.problem.pairs_fit(choice) and all(row(choice) <= limit for row, limit in self.limits)

    def argmin(self, scores: Sequence[Floats] | None = None, order: Order = ()) -> list[int]:
        """The choice with the least score that fits, exactly; one linear budget by the sweep, several by the program.

        Args:
            scores: by group, ``[bits]``; default: the problem's, Ω unless it says otherwise.
            order: chains of groups along which bits may not fall.

        Raises:
            HawqError: no plan fits; the message has the cheapest one for every budget.
        """
        limits, problem = self.limits, self.problem
        if len(limits) == 1:
            row, limit = limits[0]
            if order and not row.pairs and not problem.allowed_pairs:
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


def min_cost(problem: Problem, limit: UpperLimit, others: Sequence[UpperLimit] = (), order: Order = ()) -> float:
    """What the cheapest plan costs by one limit, ``inf`` when no plan meets the others.

    Args:
        problem: to choose from.
        limit: whose cost is minimised.
        others: limits to keep.
        order: chains of groups along which bits may not fall.
    """
    rows = cost_rows(problem, limit.cost)
    limits = [(row, u.limit * (1 + SLACK)) for u in others for row in cost_rows(problem, u.cost)]
    if len(rows) == 1:
        choice = solve(problem, limits, objective=rows[0], order=order)
        return math.inf if choice is None else rows[0](choice)
    # a peak: find the lowest limit on all rows by bisection, then what that plan really has
    low, high, best = 0.0, cost_of(problem, limit.cost, [len(g.bits) - 1 for g in problem.groups]), math.inf
    for _ in range(40):
        bound = high if best == math.inf else (low + high) / 2
        choice = solve(problem, [*limits, *((row, bound) for row in rows)], order=order)
        if choice is None:
            if best == math.inf:
                return math.inf
            low = bound
        else:
            high = best = cost_of(problem, limit.cost, choice)
        if high - low <= 1e-9 * high:
            break
    return best


def infeasible(request: Request, order: Order = ()) -> str:
    """One sentence: which budget cannot be met, and the cheapest plan by each.

    Args:
        request: that no plan meets.
        order: chains of groups along which bits may not fall.
    """
    problem, limits = request.problem, request.upper_limits
    alone = {u: min_cost(problem, u, order=order) for u in limits}
    if all(math.isinf(v) for v in alone.values()):
        return "No plan exists at all: the device's pairs and tables leave no common choice."

    def cheapest(u: UpperLimit) -> str:
        return format_cost(problem, u.cost, alone[u])

    broken = [u for u, v in alone.items() if v > u.limit * (1 + SLACK)]
    if broken:
        parts = [f"budget {u.text!r} cannot be met: the smallest plan is {cheapest(u)}" for u in broken]
        parts += [f"budget {u.text!r} alone can: its smallest plan is {cheapest(u)}" for u in limits if u not in broken]
    else:
        parts = ["these budgets cannot be met together"]
        for u in limits:
            cost = min_cost(problem, u, [x for x in limits if x is not u], order)
            need = "no plan meets the others" if math.isinf(cost) else f"at least {format_cost(problem, u.cost, cost)}"
            parts.append(f"{u.text!r} needs {need} under the others and {cheapest(u)} alone")
    if order and solve(problem, request.limits) is not None:
        parts.append("this selector keeps bits in an order; 'pareto' can meet the budget")
    text = "; ".join(parts) + "."
    return text[0].upper() + text[1:]
