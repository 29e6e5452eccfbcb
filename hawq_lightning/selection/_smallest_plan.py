"""The smallest of some plans whose measured loss is low enough, found by a few measurements."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from hawq_lightning._errors import HawqError
from hawq_lightning._plan import Plan
from hawq_lightning.selection._costs import format_cost
from hawq_lightning.selection._plan_frontier import PlanFrontier

Expected = Callable[[Mapping[str, int]], float]
"""From the bits of every site to the loss that is expected, such as :meth:`hawq_lightning.quantization.Forecast.of`."""
TOLERANCE = 0.02
_MOST = 40  # measurements
_SMALL_STEPS, _LARGER, _LEAST = (
    5,
    2.0,
    0.5,
)  # below what was found: steps of the tolerance, of twice that, down to a half
_HOPELESS = (3.0, 3)  # times the limit, so often in a row


def smallest_plan(
    front: PlanFrontier,
    limit: float,
    measured: Callable[[Plan], float],
    expected: Expected | None = None,
    *,
    max_cost: float | None = None,
    tolerance: float = TOLERANCE,
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
    found, seen = first_within(
        [float(cost[i]) for i in order],
        limit,
        lambda k: measured(front.plan(order[k])),
        None if expected is None else lambda k: expected(front.bits(order[k])),
        tolerance,
    )
    if found is None:
        nearest = min(seen, key=lambda k: seen[k])
        size = format_cost(front.problem, front.cost_name, float(cost[order[nearest]]))
        raise HawqError(
            f"No plan keeps the loss at {limit:g}: the nearest has {seen[nearest]:.3g}, at {size}. Allow more widths, "
            "or a higher loss."
        )
    plan = front.plan(order[found])
    return plan.replace(settings={**plan.settings, "measured_loss": seen[found]}), seen[found]


def first_within(
    costs: Sequence[float],
    limit: float,
    measured: Callable[[int], float],
    expected: Callable[[int], float] | None = None,
    tolerance: float = TOLERANCE,
    look_below: bool = False,
) -> tuple[int | None, dict[int, float]]:
    """The first of some plans, in ascending cost, that keeps a limit; for losses that fall along them, but for noise.

    Args:
        costs: of the plans, ascending.
        limit: the most that is allowed.
        measured: number of a plan -> its loss; asked once each.
        expected: number of a plan -> the loss that is expected, up to a factor that is learned; ``None``: nothing is.
        tolerance: share of its cost by which the plan found may be larger than one that was seen to fail.
        look_below: try smaller plans as well, until they are hopeless: losses go up and down along the plans, those of
            few samples most.

    Returns:
        its number, ``None`` if none was found, and what was measured.
    """
    seen: dict[int, float] = {}
    fails, right, ratio = -1, len(costs), 1.0
    while right - fails > 1:
        if fails >= 0 and right < len(costs) and costs[right] <= costs[fails] * (1 + tolerance):
            break
        k = _guess(len(costs), fails, right, limit / ratio, expected)
        seen[k] = measured(k)
        if seen[k] <= limit:
            right = k
        else:
            fails = k
        if expected is not None and 0 < (value := expected(k)) < math.inf and 0 < seen[k] < math.inf:
            ratio = seen[k] / value
    if look_below and right < len(costs):
        right = _look_below(costs, limit, measured, tolerance, right, seen)
    return (None if right == len(costs) else right), seen


def _look_below(
    costs: Sequence[float],
    limit: float,
    measured: Callable[[int], float],
    tolerance: float,
    found: int,
    seen: dict[int, float],
) -> int:
    """A smaller plan that keeps the limit, if one is met: first a few small steps down, then larger ones."""
    k, steps, hopeless = found, 0, 0
    while hopeless < _HOPELESS[1] and len(seen) < _MOST:
        steps += 1
        step = tolerance if steps <= _SMALL_STEPS else _LARGER * tolerance
        below = bisect_right(costs, costs[k] * (1 - step)) - 1
        if below < 0 or costs[below] < _LEAST * costs[found]:
            break
        k = below
        if k not in seen:
            seen[k] = measured(k)
        if seen[k] <= limit:
            found, steps = k, 0
        hopeless = hopeless + 1 if seen[k] > _HOPELESS[0] * limit else 0
    return found


def _guess(count: int, fails: int, right: int, limit: float, expected: Callable[[int], float] | None) -> int:
    """The next plan to measure, strictly between ``fails`` and ``right``."""
    low, high = fails + 1, right - 1
    if expected is None:
        return (low + high) // 2
    while low < high:  # the first of which so little is expected
        middle = (low + high) // 2
        if expected(middle) <= limit:
            high = middle
        else:
            low = middle + 1
    # a guess at either end hardly narrows the interval: not twice the same side in a row
    width = right - fails
    at_edge = 8 * min(low - fails, right - low) < width
    return (fails + right) // 2 if at_edge and fails >= 0 and right < count else low
