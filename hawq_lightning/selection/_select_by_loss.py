"""From a budget by loss to a plan: forecast, measured, and moved along the sizes until what is measured meets it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from hawq_lightning._errors import HawqError
from hawq_lightning._plan import Plan
from hawq_lightning._progress import seconds_since
from hawq_lightning._types import JsonObject
from hawq_lightning.quantization import PlanLoss
from hawq_lightning.selection._budget import parse_budget
from hawq_lightning.selection._by_size import SIZE, PlansBySize, plans_by_size
from hawq_lightning.selection._costs import cost_of, format_cost
from hawq_lightning.selection._loss_budget import LossBudget, loss_budget
from hawq_lightning.selection._plans import make_plan
from hawq_lightning.selection._problem import Problem
from hawq_lightning.selection._smallest_plan import TOLERANCE, first_within
from hawq_lightning.selection._units import round_up

ExpectedLoss = Callable[[Mapping[str, int]], PlanLoss]
"""From the bits of every site to what is expected of the plan."""
_FREE = 1e-6  # a limit of nothing at all, to divide by


def select_by_loss(
    problem: Problem,
    budget: object,
    measured: Callable[[Plan], PlanLoss],
    expected: ExpectedLoss | None = None,
    selector: str = "pareto",
    *,
    seed: int = 0,
    eigenvalues: Mapping[str, float] | None = None,
    tolerance: float = TOLERANCE,
) -> Plan:
    """The smallest plan that keeps a budget by loss when it is measured, and the budget's limits on costs.

    Plans are those that the selector chooses at any size of the weights, Ω deciding as ever; the forecast says where
    to begin, and measuring where to end.

    Args:
        problem: to choose from.
        budget: with ``kl`` or ``agreement``, and limits on costs if any: ``{"kl": 0.02, "bops": "50%"}``.
        measured: of a plan, on held-out data, such as :func:`hawq_lightning.quantization.distance_of_plan` gives.
        expected: from bits to the expected loss; ``None``: sizes are halved.
        selector: registered name, one that needs a budget and no loss.
        seed: of random selectors.
        eigenvalues: site name -> top Hessian eigenvalue, for selectors that need them.
        tolerance: share of its size by which the plan may be larger than one that was seen to fail.

    Returns:
        the plan; ``settings["by_loss"]`` tells limits, forecast and measurement.

    Raises:
        HawqError: the budget says nothing of the loss, a selector that cannot try sizes, no classes to agree on, or no
            plan that keeps the budget; then with the nearest that there is.
    """
    limits, loss = parse_budget(budget, problem), loss_budget(budget)
    if loss is None:
        raise HawqError("This budget says nothing of the loss; use select(), or give {kl: 0.02} beside it.")
    began = time.perf_counter()
    plans = plans_by_size(problem, limits, selector, seed=seed, eigenvalues=eigenvalues)
    search = _Search(plans, loss, measured, expected)
    found, _ = first_within(
        plans.sizes, 1.0, search.excess, None if expected is None else search.expected_excess, tolerance, True
    )
    if found is None:
        raise HawqError(search.none_found(budget))
    choice = plans.choice(found)
    assert choice is not None  # it was measured
    settings: dict[str, object] = {
        "selector_seed": seed,
        "selection_seconds": round(seconds_since(began), 4),
        "by_loss": search.record(choice),
    }
    return make_plan(problem, choice, budget=budget, selector=selector, settings=settings)


@dataclass
class _Search:
    """What is known of the plans so far, in terms of the budget."""

    plans: PlansBySize
    budget: LossBudget
    measured: Callable[[Plan], PlanLoss]
    expected: ExpectedLoss | None
    seen: dict[tuple[int, ...], PlanLoss] = field(default_factory=dict)

    def excess(self, i: int) -> float:
        """What the i-th plan measures over what the budget allows; infinite where there is no such plan."""
        choice = self.plans.choice(i)
        if choice is None:
            return math.inf
        key = tuple(choice)
        if key not in self.seen:  # two sizes may have one plan
            loss = self.measured(make_plan(self.plans.problem, choice))
            if self.budget.changed is not None and loss.changed is None:
                raise HawqError(NO_CLASSES)
            if math.isnan(loss.kl):
                raise HawqError("The measured loss of a plan is NaN: a budget by loss needs outputs that are numbers.")
            self.seen[key] = loss
        return self._over(self.seen[key])

    def expected_excess(self, i: int) -> float:
        """The same for what is expected of it."""
        bits = self.plans.bits(i)
        return math.inf if bits is None or self.expected is None else self._over(self.expected(bits))

    def record(self, choice: list[int]) -> JsonObject:
        """What a plan's settings say: limit, forecast and measurement of each part of the budget."""
        problem, loss = self.plans.problem, self.seen[tuple(choice)]
        bits = {s.name: problem.groups[g].bits[choice[g]] for s, g in zip(problem.sites, problem.group_of)}
        expected = None if self.expected is None else self.expected(bits)
        out: JsonObject = {"after": self.budget.after, "plans_measured": len(self.seen)}
        parts: tuple[tuple[str, float | None, Callable[[PlanLoss], float | None]], ...] = (
            ("kl", self.budget.kl, lambda x: x.kl),
            ("agreement", None if self.budget.changed is None else 1 - self.budget.changed, _agreement),
        )
        for name, limit, of in parts:
            if (value := of(loss)) is not None:
                figures = {"limit": limit, "forecast": None if expected is None else of(expected), "measured": value}
                out[name] = {k: v for k, v in figures.items() if v is not None}
        return out

    def none_found(self, budget: object) -> str:
        """How near the plans come, and the budget that the nearest keeps."""
        if not self.seen:
            return f"No plan of this selector keeps the budget {_shown(budget)}."
        choice = min(self.seen, key=lambda c: self._over(self.seen[c]))
        loss, problem = self.seen[choice], self.plans.problem
        size = format_cost(problem, SIZE, cost_of(problem, SIZE, choice))
        got, near = [], []
        if self.budget.kl is not None:
            got.append(f"a KL of {loss.kl:.3g}")
            near.append(f"kl: {round_up(loss.kl)}")
        if self.budget.changed is not None and loss.changed is not None:
            got.append(f"{100 * (1 - loss.changed):.4g}% of the predictions unchanged")
            near.append(f'agreement: "{math.floor(1e4 * (1 - loss.changed)) / 100:g}%"')
        what = f"{self.budget.words()}" + (" under the other limits" if _others(budget) else "")
        return (
            f"No plan keeps {what}: the nearest has {' and '.join(got)}, at {size} ({len(self.seen)} measured). "
            f"Allow wider bits, or a budget of {{{', '.join(near)}}}."
        )

    def _over(self, loss: PlanLoss) -> float:
        parts = []
        if self.budget.kl is not None:
            parts.append(loss.kl / self.budget.kl)
        if self.budget.changed is not None and loss.changed is not None:
            limit = self.budget.changed
            parts.append(loss.changed / limit if limit > 0 else 1.0 + loss.changed / _FREE * (loss.changed > 0))
        return max(parts, default=0.0)


NO_CLASSES = (
    "A budget of agreement needs predictions to agree on, and the loss takes no softmax of this network's outputs: use "
    "{kl: 0.02}, which for such outputs is the squared error over their variance."
)


def _agreement(loss: PlanLoss) -> float | None:
    return None if loss.changed is None else 1 - loss.changed


def _others(budget: object) -> bool:
    return isinstance(budget, Mapping) and bool(set(budget) - {"kl", "agreement", "after"})


def _shown(budget: object) -> str:
    return "{" + ", ".join(f"{k}: {v}" for k, v in budget.items()) + "}" if isinstance(budget, Mapping) else str(budget)
