"""Plans in ascending size, to search along: a frontier, or what a selector chooses at one size after the other."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

import numpy as np

from hawq_lightning._errors import HawqError
from hawq_lightning.selection._budget import UpperLimit
from hawq_lightning.selection._costs import cost_of, cost_rows
from hawq_lightning.selection._milp import solve
from hawq_lightning.selection._plan_frontier import PlanFrontier, plan_frontier
from hawq_lightning.selection._problem import Problem
from hawq_lightning.selection._request import Request, infeasible, min_cost
from hawq_lightning.selection._selectors import SELECTORS

SIZE = "weight_bytes"
_STEP = 1.01  # from one size to the next, where every one is a selection of its own


class PlansBySize(ABC):
    """Choices of a problem in ascending size.

    Attributes:
        sizes: bytes of weights, one a choice.
    """

    sizes: Sequence[float]

    def __init__(self, problem: Problem) -> None:
        self.problem = problem

    @abstractmethod
    def choice(self, i: int) -> list[int] | None:
        """The i-th as a position in ``bits`` for every group; ``None``: there is none of this size."""

    def bits(self, i: int) -> Mapping[str, int] | None:
        """Site name -> bits of the i-th."""
        choice, problem = self.choice(i), self.problem
        if choice is None:
            return None
        return {s.name: problem.groups[g].bits[choice[g]] for s, g in zip(problem.sites, problem.group_of, strict=True)}


def plans_by_size(
    problem: Problem,
    limits: Sequence[UpperLimit] = (),
    selector: str = "pareto",
    *,
    seed: int = 0,
    eigenvalues: Mapping[str, float] | None = None,
) -> PlansBySize:
    """The plans of a selector, from the smallest to the largest.

    Args:
        problem: to choose from.
        limits: on costs, the size among them; every plan keeps them.
        selector: registered name.
        seed: of random selectors.
        eigenvalues: for those that need them.

    Raises:
        HawqError: no plan keeps the limits, or a selector that needs more than a budget, traces and eigenvalues.
    """
    check_sizes(selector)
    request = Request(problem, tuple(limits), seed, eigenvalues)
    if "frontier" in SELECTORS[selector].offers and all(u.cost == SIZE for u in limits):
        try:
            front = plan_frontier(problem, SIZE)
        except HawqError:  # too much is coupled for a frontier
            return _Selected(request, selector)
        return _OnFrontier(front, request)
    return _Selected(request, selector)


def check_sizes(selector: str) -> None:
    """Raise HawqError unless a selector can be asked for one size after the other."""
    needs = SELECTORS[selector].needs
    if not {"budget", "budget or bits"} & needs or "loss" in needs:
        able = [n for n in SELECTORS if "budget" in SELECTORS[n].needs and "loss" not in SELECTORS[n].needs]
        raise HawqError(
            f"A budget by loss is met by trying sizes, which the selector {selector!r} cannot do; use one of "
            f"{', '.join(able)}."
        )


class _OnFrontier(PlansBySize):
    def __init__(self, front: PlanFrontier, request: Request) -> None:
        super().__init__(front.problem)
        most = min((u.limit for u in request.upper_limits), default=math.inf) * (1 + 1e-12)
        self._front = front
        self.sizes = [float(c) for c in front.cost if c <= most]
        if not self.sizes:
            raise HawqError(infeasible(request))

    def choice(self, i: int) -> list[int]:
        return self._front.choice(i)


class _Selected(PlansBySize):
    """Every size is a selection, made when it is asked for."""

    def __init__(self, request: Request, selector: str) -> None:
        super().__init__(request.problem)
        self._request, self._selector = request, SELECTORS[selector]
        size = UpperLimit(SIZE, math.inf, SIZE)
        low = min_cost(request.problem, size, request.upper_limits)
        largest = solve(request.problem, request.limits, objective=cost_rows(request.problem, SIZE)[0], maximize=True)
        if largest is None or not math.isfinite(low):
            raise HawqError(infeasible(request))
        high = cost_of(request.problem, SIZE, largest)
        steps = max(1, math.ceil(math.log(high / low) / math.log(_STEP))) if high > low else 0
        self.sizes = [float(s) for s in np.geomspace(low, high, steps + 1)]
        self._chosen: dict[int, list[int] | None] = {}

    def choice(self, i: int) -> list[int] | None:
        if i not in self._chosen:
            limit = UpperLimit(SIZE, self.sizes[i], f"{self.sizes[i]:.0f}B")
            limits = (*self._request.upper_limits, limit)
            request = Request(self.problem, limits, self._request.seed, self._request.eigenvalues)
            try:
                self._chosen[i] = self._selector.choose(request)
            except HawqError:  # a rule that is stricter than the limits
                self._chosen[i] = None
        return self._chosen[i]
