"""The search that Hessian traces replace: greedy by measured loss (the kind of rival in the paper's Table 4)."""

from __future__ import annotations

import math

from hawq_lightning._errors import HawqError
from hawq_lightning.selection._milp import solve
from hawq_lightning.selection._plans import make_plan
from hawq_lightning.selection._request import Request, infeasible


def accuracy(request: Request) -> list[int]:
    """Every group alone is lowered to every width and the loss measured; then steps down by least loss per saving.

    The number of measurements goes into the plan's settings, beside the seconds that they took.

    Raises:
        HawqError: no ``measure_loss``, a loss that is no number, or no plan that fits.
    """
    measure, problem = request.measure_loss, request.problem
    if measure is None:
        raise HawqError("The selector 'accuracy' needs measure_loss: a function from a plan to its measured loss.")
    if solve(problem, request.limits) is None:
        raise HawqError(infeasible(request))

    count = 0

    def loss_of(choice: list[int]) -> float:
        nonlocal count
        count += 1
        loss = float(measure(make_plan(problem, choice, selector="accuracy")))
        if math.isnan(loss):
            raise HawqError(f"measure_loss returned NaN at measurement {count}.")
        return loss

    top = [len(g.bits) - 1 for g in problem.groups]
    if not problem.pairs_fit(top):
        start = solve(problem, (), objective=problem.cost(request.bounds[0].cost)[0], maximize=True)
        assert start is not None
        top = start
    full = loss_of(top)
    rise: list[list[float]] = []
    for g, group in enumerate(problem.groups):
        rise.append([0.0] * len(group.bits))
        for k in range(top[g]):
            rise[g][k] = loss_of([*top[:g], k, *top[g + 1 :]]) - full
    request.notes["measurements"] = count

    choice = list(top)
    limits = request.limits
    while not request.fits(choice):
        over = [max(0.0, row(choice) - limit) / limit for row, limit in limits]  # relative
        steps = []
        for g, k in enumerate(choice):
            for lower in range(k):
                grown = (row.change(choice, g, lower) / limit for row, limit in limits)
                saved = sum(min(o, -d) for o, d in zip(over, grown))
                if saved > 0 and (not problem.masks or problem.pairs_fit([*choice[:g], lower, *choice[g + 1 :]])):
                    steps.append(((rise[g][lower] - rise[g][k]) / saved, g, lower))
        if not steps:
            # pairs that only change together: the sum of measured rises is then minimised exactly
            import numpy as np

            scores = [np.asarray(r) - min(r) for r in rise]
            exact = solve(problem, limits, scores=scores)
            assert exact is not None
            return exact
        _, g, lower = min(steps)
        choice[g] = lower
    return choice
