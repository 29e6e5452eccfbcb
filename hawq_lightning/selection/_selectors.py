"""Selectors: what a registered one declares, and those that are more than a baseline."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from hawq_lightning._errors import HawqError
from hawq_lightning._io import PLAN_JSON, read_json
from hawq_lightning._plan import FORMAT, Plan
from hawq_lightning._registry import Registry
from hawq_lightning.selection._constraints import matching
from hawq_lightning.selection._costs import cost_of, format_cost
from hawq_lightning.selection._milp import solve
from hawq_lightning.selection._monotone import trace_order
from hawq_lightning.selection._problem import Problem
from hawq_lightning.selection._request import Request

Choose = Callable[[Request], list[int]]
Need = Literal["budget", "bits", "budget or bits", "traces", "eigenvalues", "loss"]
Offer = Literal["stable_plan", "bootstrap", "preview", "without_traces", "frontier"]


@dataclass(frozen=True)
class Selector:
    """A rule of choice, with what it needs and offers.

    Attributes:
        name: as registered.
        choose: from a request to a choice, the position in ``bits`` for every group.
        needs: ``budget``, ``bits`` (by hand), ``budget or bits``; ``traces``; ``eigenvalues`` (top ones of the
            Hessian), ``loss`` (of plans, measured): who asks the selector measures these for it.
        offers: ``stable_plan``: measuring may stop when its plan no longer changes; ``bootstrap``: it is repeated under
            redrawn traces; ``preview``: it chooses the same whatever the scores are, so it is tried before anything is
            measured; ``without_traces``: it reads neither Ω nor traces, so that ``HAWQ`` measures none for it;
            ``frontier``: under a budget of one cost its plans are those of :func:`plan_frontier`.
    """

    name: str
    choose: Choose
    needs: frozenset[Need]
    offers: frozenset[Offer]

    def check(self, budget: object, bits: object = None) -> None:
        """Refuse a request that lacks the budget or the bits that this selector needs.

        Args:
            budget: as the user gave it; ``None``: none.
            bits: given by hand, or ``None``.

        Raises:
            HawqError: something is lacking.
        """
        if "bits" in self.needs and bits is None:
            raise HawqError(
                f"The selector {self.name!r} needs bits: a mapping of site -> bits, or the path of a plan or JSON file."
            )
        if budget is None and ("budget" in self.needs or ("budget or bits" in self.needs and bits is None)):
            raise HawqError(f'The selector {self.name!r} needs a budget, such as "12x".')


SELECTORS: Registry[Selector] = Registry("selector")


def register_selector(
    name: str, *, needs: tuple[Need, ...] = ("budget",), offers: tuple[Offer, ...] = ()
) -> Callable[[Choose], Choose]:
    """Decorator: make a function from a :class:`Request` to a choice known by name.

    Args:
        name: lower-case letters, digits and underscores; goes into plans.
        needs: see :class:`Selector`.
        offers: see :class:`Selector`.

    Raises:
        HawqError: a malformed name, or another selector has it.
    """

    def add(choose: Choose) -> Choose:
        SELECTORS.add(name, Selector(name, choose, frozenset(needs), frozenset(offers)))
        return choose

    return add


@register_selector("pareto", offers=("stable_plan", "bootstrap", "frontier"))
def pareto(request: Request) -> list[int]:
    """Least total score, Ω by default, under the budgets, exactly."""
    return request.argmin()


@register_selector("monotone", needs=("budget", "traces"), offers=("stable_plan", "bootstrap"))
def monotone(request: Request) -> list[int]:
    """Least total Ω within the paper's set B (section 2.3): bits never fall as the mean trace rises."""
    return request.argmin(order=trace_order(request.problem))


@register_selector("uniform", offers=("preview", "without_traces"))
def uniform(request: Request) -> list[int]:
    """The same weight bits everywhere and the same activation bits everywhere; of those that fit, least Ω."""
    return best_uniform(request, {}, "uniform")


@register_selector("manual", needs=("bits",), offers=("preview", "without_traces"))
def manual(request: Request) -> list[int]:
    """Bits given by hand: a mapping site -> bits (globs allowed), a plan file, or a JSON file of such a mapping."""
    given = request.bits
    if isinstance(given, (str, Path)):
        data = read_json(given, "manual plan", PLAN_JSON)
        given = Plan.from_dict(data).bits if isinstance(data, dict) and data.get("format") == FORMAT else data
    if not isinstance(given, Mapping):
        raise HawqError("A manual plan must map site names to bits.")
    problem = request.problem
    bits: dict[str, int] = {}
    for pattern in sorted(given, key=lambda p: p in problem.index):  # full names last: they win
        for i in matching(pattern, problem.sites, problem.first_to_last):
            bits[problem.sites[i].name] = given[pattern]
    choice = problem.choice_of(bits)
    if not request.fits(choice):
        for u in request.upper_limits:
            cost = cost_of(problem, u.cost, choice)
            if cost > u.limit:
                raise HawqError(
                    f"The manual plan exceeds the budget {u.text!r}: its {u.cost} is {cost:.6g}, "
                    f"the limit {u.limit:.6g}."
                )
    return choice


def uniform_choice(problem: Problem, weight_bits: int, activation_bits: int | None) -> list[int] | None:
    """The choice with these bits wherever a group has them; groups with one width keep theirs.

    ``activation_bits=None`` leaves activations at their least score. None: some group with a choice lacks the width.
    """
    out = []
    for group in problem.groups:
        width = weight_bits if group.kind == "weight" else activation_bits
        if len(group.bits) == 1:
            out.append(0)
        elif width is None:
            out.append(int(np.argmin(group.score)))
        elif width in group.bits:
            out.append(group.bits.index(width))
        else:
            return None
    return out


def best_uniform(request: Request, held: Mapping[int, int], name: str) -> list[int]:
    """Of the plans with equal weight bits and equal activation bits, the one that fits with the least score.

    Args:
        request: the budgets.
        held: group -> position that it takes whatever the others take.
        name: of the selector, for messages.

    Raises:
        HawqError: none fits.
    """
    problem = request.problem
    widths = {
        kind: sorted({b for g in problem.groups if g.kind == kind and len(g.bits) > 1 for b in g.bits}) or [0]
        for kind in ("weight", "activation")
    }
    choices: list[list[int]] = []
    for w, a in itertools.product(widths["weight"], [None, *widths["activation"]]):
        choice = uniform_choice(problem, w, a)
        if choice is not None:
            choices.append([held.get(g, k) for g, k in enumerate(choice)])
    fitting = [c for c in choices if request.fits(c)]
    if fitting:
        return min(fitting, key=problem.score_of)
    possible = [c for c in choices if problem.pairs_fit(c)]
    if not possible:
        raise HawqError(f"No width is available to all sites, so the selector {name!r} has no plan.")
    best = solve(problem, request.limits) is not None
    least = "; ".join(
        f"{b.text!r}: at least {format_cost(problem, b.cost, min(cost_of(problem, b.cost, c) for c in possible))}"
        for b in request.upper_limits
    )
    raise HawqError(f"No {name} plan meets the budget ({least})" + ("; the selector 'pareto' can." if best else "."))
