"""What a choice costs, by every registered cost: budgets, plans, the dry run and the report read it from here."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TypeVar
from weakref import WeakKeyDictionary

from hawq_lightning._errors import HawqError, nearest
from hawq_lightning._registry import Registry
from hawq_lightning.selection._cost import Cost, TableCost
from hawq_lightning.selection._linear_cost import LinearCost, largest
from hawq_lightning.selection._problem import Problem

COSTS: Registry[Cost] = Registry("cost")
AnyCost = TypeVar("AnyCost", bound=type[Cost])


def register_cost(name: str) -> Callable[[AnyCost], AnyCost]:
    """Class decorator: make a :class:`SiteCost` or :class:`LayerCost` known by name, for budgets and plans.

    Args:
        name: lower-case letters, digits and underscores; goes into plans, so say the unit (``energy_uj``).

    Raises:
        HawqError: a malformed name, or another cost has it.
    """

    def add(cls: AnyCost) -> AnyCost:
        cost = cls()
        cost.name = name
        COSTS.add(name, cost)
        return cls

    return add


def cost_named(problem: Problem, name: str) -> Cost:
    """A cost of the problem's own, or a registered one.

    Raises:
        HawqError: there is none; the message names the nearest.
    """
    if name in (problem.extra_costs or {}):
        return TableCost(name)
    if name not in COSTS:
        choices = [*COSTS, *(problem.extra_costs or {})]
        raise HawqError(f"There is no cost {name!r}; use one of {', '.join(choices)}.{nearest(name, choices)}")
    return COSTS[name]


# rows by problem: selectors ask for them again and again; entries go with their problem
_ROWS: WeakKeyDictionary[Problem, dict[str, tuple[LinearCost, ...]]] = WeakKeyDictionary()


def cost_rows(problem: Problem, name: str) -> tuple[LinearCost, ...]:
    """The linear functions whose largest is the cost.

    Raises:
        HawqError: no such cost, or the problem lacks what it needs (latencies, time steps, activations).
    """
    rows = _ROWS.setdefault(problem, {})
    if name not in rows:
        cost = cost_named(problem, name)
        if missing := cost.missing(problem):
            raise HawqError(missing)
        rows[name] = cost.rows(problem)
    return rows[name]


def cost_of(problem: Problem, name: str, choice: Sequence[int]) -> float:
    """What a choice costs, in the unit that the cost's name says.

    Raises:
        HawqError: see :func:`cost_rows`.
    """
    return largest(cost_rows(problem, name), choice)


def costs_of(problem: Problem, choice: Sequence[int], budget: object = None) -> dict[str, float]:
    """Every cost of a choice that the problem has the numbers for, further figures (compressions ...), Ω by kind.

    Args:
        problem: what the choice is of.
        choice: position in its bits for every group.
        budget: some costs are shown only where it names them.
    """
    names = [name for name in available_costs(problem) if COSTS[name].is_asked_for(problem, budget)]
    out = {name: cost_of(problem, name, choice) for name in (*names, *(problem.extra_costs or {}))}
    for name, cost in list(out.items()):
        out |= cost_named(problem, name).figures(problem, cost)
    for kind in ("weight", "activation"):
        out[f"omega_{kind}s"] = math.fsum(float(g.omega[k]) for g, k in zip(problem.groups, choice) if g.kind == kind)
    return out


def available_costs(problem: Problem) -> list[str]:
    """The registered costs that the problem has the numbers for."""
    return [name for name in COSTS if not COSTS[name].missing(problem)]


def format_cost(problem: Problem, name: str, cost: float) -> str:
    """A cost in the units that budgets use, rounded up so that it can be given back as one."""
    return "none" if math.isinf(cost) else cost_named(problem, name).format(problem, cost)
