"""A budget by loss: the smallest plan of a frontier whose measured loss is low enough."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from hawq_lightning._errors import HawqError
from hawq_lightning._plan import Plan
from hawq_lightning.selection._costs import format_cost
from hawq_lightning.selection._plan_frontier import PlanFrontier

Expected = Callable[[Mapping[str, int]], float]
"""From the bits of every site to the loss that is expected, such as :meth:`hawq_lightning.quantization.Forecast.of`."""


def smallest_plan(
    front: PlanFrontier,
    limit: float,
    measured: Callable[[Plan], float],
    expected: Expected | None = None,
    *,
    max_cost: float | None = None,
    tolerance: float = 0.02,
) -> tuple[Plan, float]:
    """The smallest plan on a frontier that keeps a limit when its loss is measured.

    Along the frontier the loss falls as plans grow, but for noise. The forecast says where to begin; from there on it
    is corrected by what the last plan measured over what was expected of it, and the interval between the largest plan
    that fails and the smallest that passes is narrowed.

    Args:
        front: from :func:`hawq_lightning.selection.plan_frontier`.
        limit: the most that the loss may be, in the unit of ``measured``: a KL divergence, a share of changed
            predictions.
        measured: of a plan, on held-out data: such as what :func:`hawq_lightning.quantization.loss_of_plan` gives with
            a :class:`hawq_lightning.quantization.FloatDistance`.
        expected: where to look first; ``None``: in the middle.
        max_cost: plans that cost more are left out.
        tolerance: share of its cost by which the plan may be larger than the smallest that was seen to pass need be.

    Returns:
        the plan, with ``measured_loss`` among its settings, and its measured loss.

    Raises:
        HawqError: no plan keeps the limit; the message has the loss of the one that comes nearest.
    """
    cost = np.asarray(front.cost, dtype=np.float64)
    order = [int(i) for i in np.argsort(cost, kind="stable") if max_cost is None or cost[i] <= max_cost]
    if not order:
        least = format_cost(front.problem, front.cost_name, float(cost.min()))
        raise HawqError(f"No plan costs so little: the smallest is {least}.")
    seen: dict[int, float] = {}

    def passes(k: int) -> bool:
        seen[k] = measured(front.plan(order[k]))
        return seen[k] <= limit

    fails, right, ratio = -1, len(order), 1.0
    while right - fails > 1:
        if fails >= 0 and right < len(order) and cost[order[right]] <= cost[order[fails]] * (1 + tolerance):
            break
        k = _guess(front, order, fails, right, limit / ratio, expected)
        if passes(k):
            right = k
        else:
            fails = k
        if expected is not None and (value := expected(front.bits(order[k]))) > 0 and seen[k] > 0:
            ratio = seen[k] / value
    if right == len(order):
        nearest = min(seen, key=lambda k: seen[k])
        size = format_cost(front.problem, front.cost_name, float(cost[order[nearest]]))
        raise HawqError(
            f"No plan keeps the loss at {limit:g}: the nearest has {seen[nearest]:.3g}, at {size}. Allow more widths, "
            "or a higher loss."
        )
    plan = front.plan(order[right])
    return plan.replace(settings={**plan.settings, "measured_loss": seen[right]}), seen[right]


def _guess(
    front: PlanFrontier, order: list[int], fails: int, right: int, limit: float, expected: Expected | None
) -> int:
    """The next point to measure, strictly between ``fails`` and ``right``."""
    low, high = fails + 1, right - 1
    if expected is None:
        return (low + high) // 2
    while low < high:  # the first of which so little is expected
        middle = (low + high) // 2
        if expected(front.bits(order[middle])) <= limit:
            high = middle
        else:
            low = middle + 1
    # a guess at either end hardly narrows the interval: not twice the same side in a row
    width = right - fails
    at_edge = 8 * min(low - fails, right - low) < width
    return (fails + right) // 2 if at_edge and fails >= 0 and right < len(order) else low
