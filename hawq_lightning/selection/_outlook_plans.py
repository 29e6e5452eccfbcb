"""Plans that an outlook is held against: uniform ones, and some of the frontier."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from hawq_lightning._plan import Plan
from hawq_lightning.quantization import Forecast, PlanLoss
from hawq_lightning.selection._outlook import FRONTIER, MeasuredPlan, forecast_of
from hawq_lightning.selection._plan_frontier import PlanFrontier
from hawq_lightning.selection._plans import make_plan
from hawq_lightning.selection._problem import Problem
from hawq_lightning.selection._selectors import uniform_choice

PASSES = 10
"""Plans that an outlook is held against at the most, a pass over the held-out data each."""
_OF_INTEREST = (1e-4, 1.0)  # KL: below it nothing changes, above it little is left of a network


def look_ahead(
    front: PlanFrontier | None, problem: Problem, forecast: Forecast, count: int = PASSES
) -> list[tuple[str, Plan]]:
    """Plans to hold a forecast against: uniform ones, and some of the frontier, where its KL is of interest.

    Args:
        front: of the problem; ``None``: there is none, and uniform plans have to do.
        problem: to choose from.
        forecast: of its plans.
        count: how many at the most.

    Returns:
        label and plan.
    """
    forecast = replace(forecast, start=0.0)  # the same for all: plans are spread by the rest
    widths = sorted({b for g in problem.groups if g.kind == "weight" for b in g.bits})
    uniform = [(b, c) for b in widths if (c := uniform_choice(problem, b, None)) is not None and problem.pairs_fit(c)]
    low, high = _OF_INTEREST
    middle = math.sqrt(low * high) * 3
    expected = forecast_of(problem, np.asarray([c for _, c in uniform]).reshape(-1, len(problem.groups)), forecast)
    off = [abs(math.log(max(e, low / 10) / middle)) for e in expected]
    most_uniform = count if front is None else max(1, count // 5)
    nearest = sorted(range(len(uniform)), key=lambda i: off[i])[:most_uniform]
    plans = [(f"uniform, {uniform[i][0]} bit", uniform[i][1]) for i in nearest]
    if front is not None:
        points = np.unique(np.linspace(0, len(front) - 1, 500).round().astype(np.int64))
        along = forecast_of(problem, front.choices(points), forecast)
        if front.omega[0] > 0:  # as an outlook mixes them: the one has steps where the other has none
            along = np.sqrt(np.maximum(along, 1e-12) * front.omega[points] / 2)
        least, most = max(float(along.min()), low), min(float(along.max()), high)
        apart: list[int] = []
        for target in np.geomspace(least, max(least, most), count - len(plans)):
            distance = np.abs(np.log(np.maximum(along, 1e-12) / target))
            distance[apart] = np.inf
            apart.append(int(np.argmin(distance)))
        plans += [(FRONTIER, front.choice(int(points[i]))) for i in apart if len(apart) <= len(points)]
    listed = {tuple(c): (label, c) for label, c in plans}  # of one that is both, the frontier's
    return [(label, make_plan(problem, c)) for label, c in listed.values()]


def hold_against(
    plans: Sequence[tuple[str, Plan]], forecast: Forecast, measured: Callable[[Plan], PlanLoss]
) -> tuple[MeasuredPlan, ...]:
    """Measure plans that were forecast.

    Args:
        plans: from :func:`look_ahead`.
        forecast: of them.
        measured: of a plan, on held-out data.
    """
    out = []
    for label, plan in plans:
        loss = measured(plan)
        size = float(plan.costs["weight_bytes"])
        out.append(MeasuredPlan(label, forecast.after, size, forecast.of(plan), plan.omega, loss.kl, loss.changed))
    return tuple(out)
