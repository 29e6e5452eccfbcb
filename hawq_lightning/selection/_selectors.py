"""Selectors by name: the exact frontier, the paper's set B, and what both are compared with (Tables 1 to 5)."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from hawq_lightning._errors import HawqError, nearest
from hawq_lightning._io import read_json
from hawq_lightning._plan import FORMAT, Plan
from hawq_lightning.selection._accuracy import accuracy
from hawq_lightning.selection._constraints import matching
from hawq_lightning.selection._costs import Linear
from hawq_lightning.selection._frontier import Floats
from hawq_lightning.selection._milp import solve
from hawq_lightning.selection._monotone import trace_order
from hawq_lightning.selection._problem import Problem
from hawq_lightning.selection._request import Request, infeasible, shown

Selector = Callable[[Request], list[int]]


def pareto(request: Request) -> list[int]:
    """Least total Ω under the budgets, exactly."""
    return request.least()


def monotone(request: Request) -> list[int]:
    """Least total Ω within the paper's set B (section 2.3): bits never fall as the mean trace rises."""
    return request.least(order=trace_order(request.problem))


def uniform(request: Request) -> list[int]:
    """The same weight bits everywhere and the same activation bits everywhere; of those that fit, least Ω."""
    return _uniform(request, {}, "uniform")


def direct(request: Request) -> list[int]:
    """The paper's Direct rows: first and last layer at 8 bits (or their most), the rest equal."""
    problem = request.problem
    weights = [g for g, group in enumerate(problem.groups) if group.kind == "weight"]
    ends = weights[0], weights[-1]
    if problem.layers:
        ends = tuple(problem.group_of[problem.index[problem.layers[i].weight]] for i in (0, -1))  # type: ignore[assignment]
    return _uniform(request, {g: len(problem.groups[g].bits) - 1 for g in ends}, "direct")


def l2(request: Request) -> list[int]:
    """Table 3b's ablation: least total ``||ΔW||^2``, no Hessian."""
    return request.least(_scores(request.problem, {}))


def top_eigenvalue(request: Request) -> list[int]:
    """Table 5's ablation: least total ``λ₁ ||ΔW||^2``."""
    return request.least(_scores(request.problem, _eigenvalues(request, "top_eigenvalue")))


def hawq(request: Request) -> list[int]:
    """HAWQ's first version: sites ordered by ``λ₁ / n``, bits monotone in it, the plan nearest in size to the budgets.

    Of what no budget counts (activations, say) it takes the least Ω. The first version left the choice inside that
    order to a person; ``bits`` may give it, and is then checked.
    """
    problem = request.problem
    values = _eigenvalues(request, "hawq")
    ranks = []
    for group in problem.groups:
        members = [problem.sites[i] for i in group.members]
        ranks.append(max(values.get(s.name, 0.0) for s in members) / sum(s.numel for s in members))
    order = trace_order(problem, ranks)
    if request.bits is not None:
        choice = manual(request)
        for chain in order:
            for a, b in itertools.pairwise(chain):
                if problem.groups[a].bits[choice[a]] > problem.groups[b].bits[choice[b]] and ranks[a] < ranks[b]:
                    names = [problem.sites[problem.groups[g].members[0]].name for g in (a, b)]
                    raise HawqError(f"HAWQ's order forbids more bits for {names[0]!r} than for {names[1]!r}.")
        return choice
    used = _used(request)
    if used.pairs or len(request.limits) > 1 or problem.masks:
        found = solve(problem, request.limits, objective=used, order=order, maximize=True)
        if found is None:
            raise HawqError(infeasible(request, order))
        return found
    # the sweep looks for the least score: how much smaller than the largest plan
    return request.least([u.max() - u for u in used.unary], order)


def max_perturbation(request: Request) -> list[int]:
    """Table 3a's ablation: the largest Ω within set B among plans of nearly the same size (within 3%)."""
    problem, order = request.problem, trace_order(request.problem)
    sizes = []
    for b in request.bounds:
        row, *more = problem.cost(b.cost)
        if more:  # a peak has no floor
            continue
        largest = solve(problem, request.limits, objective=row, order=order, maximize=True)
        if largest is None:
            raise HawqError(infeasible(request, order))
        sizes.append((row, min(b.limit, row(largest))))
    for share in (0.97, 0.9, 0.0):
        floors = [(row, share * limit) for row, limit in sizes]
        found = solve(problem, request.limits, floors=floors, order=order, maximize=True)
        if found is not None:
            return found
    raise HawqError(infeasible(request, order))


def random_plan(request: Request) -> list[int]:
    """A random plan at the budget: from the cheapest plan, random steps up for as long as any fits."""
    problem, bounds = request.problem, request.bounds
    rows = problem.cost(bounds[0].cost)
    choice = solve(problem, request.limits, objective=rows[0])
    if choice is None:
        raise HawqError(infeasible(request))
    draw = random.Random(request.seed)
    steps = [(g, k) for g, group in enumerate(problem.groups) for k in range(len(group.bits))]
    draw.shuffle(steps)
    for _ in range(2):  # a step that did not fit with its partner may fit once that has moved
        for g, k in steps:
            if k > choice[g] and request.fits(tried := [*choice[:g], k, *choice[g + 1 :]]):
                choice = tried
    return choice


def manual(request: Request) -> list[int]:
    """Bits given by hand: a mapping site -> bits (globs allowed), a plan file, or a JSON file of such a mapping."""
    given = request.bits
    if isinstance(given, (str, Path)):
        data = read_json(given, "manual plan")
        given = Plan.from_dict(data).bits if isinstance(data, dict) and data.get("format") == FORMAT else data
    if not isinstance(given, Mapping):
        raise HawqError("A manual plan must map site names to bits.")
    problem = request.problem
    bits: dict[str, int] = {}
    for pattern in sorted(given, key=lambda p: p in problem.index):  # full names last: they win
        for i in matching(pattern, problem.sites, problem.layers):
            bits[problem.sites[i].name] = given[pattern]
    choice = problem.choice_of(bits)
    if not request.fits(choice):
        for b in request.bounds:
            have = problem.cost_of(b.cost, choice)
            if have > b.limit:
                raise HawqError(
                    f"The manual plan exceeds the budget {b.text!r}: its {b.cost} is {have:.6g}, "
                    f"the limit {b.limit:.6g}."
                )
    return choice


SELECTORS: dict[str, Selector] = {
    "pareto": pareto,
    "monotone": monotone,
    "uniform": uniform,
    "direct": direct,
    "l2": l2,
    "top_eigenvalue": top_eigenvalue,
    "hawq": hawq,
    "max_perturbation": max_perturbation,
    "random": random_plan,
    "manual": manual,
    "accuracy": accuracy,
}


def check_selector(name: Any, budget: Any, bits: Any = None) -> None:
    """Raise HawqError for a selector that does not exist, or that lacks the budget or the bits that it needs."""
    if not isinstance(name, str) or name not in SELECTORS:
        raise HawqError(
            f"There is no selector {name!r}; use one of {', '.join(SELECTORS)}.{nearest(str(name), SELECTORS)}"
        )
    if name == "manual" and bits is None:
        raise HawqError(
            "The selector 'manual' needs bits: a mapping of site -> bits, or the path of a plan or JSON file."
        )
    if budget is None and name != "manual" and not (name == "hawq" and bits is not None):
        raise HawqError(f'The selector {name!r} needs a budget, such as "12x".')


def uniform_choice(problem: Problem, weight_bits: int, activation_bits: int | None) -> list[int] | None:
    """The choice with these bits wherever a group has them; groups with one width keep theirs.

    ``activation_bits=None`` leaves activations at their least Ω. None: some group with a choice lacks the width.
    """
    out = []
    for group in problem.groups:
        wanted = weight_bits if group.kind == "weight" else activation_bits
        if len(group.bits) == 1:
            out.append(0)
        elif wanted is None:
            out.append(int(np.argmin(group.omega)))
        elif wanted in group.bits:
            out.append(group.bits.index(wanted))
        else:
            return None
    return out


def _uniform(request: Request, held: Mapping[int, int], name: str) -> list[int]:
    problem = request.problem
    widths = {
        kind: sorted({b for g in problem.groups if g.kind == kind and len(g.bits) > 1 for b in g.bits}) or [0]
        for kind in ("weight", "activation")
    }
    found: list[list[int]] = []
    for w, a in itertools.product(widths["weight"], [None, *widths["activation"]]):
        choice = uniform_choice(problem, w, a)
        if choice is not None:
            found.append([held.get(g, k) for g, k in enumerate(choice)])
    fitting = [c for c in found if request.fits(c)]
    if fitting:
        return min(fitting, key=problem.omega_of)
    possible = [c for c in found if problem.pairs_fit(c)]
    if not possible:
        raise HawqError(f"No width is available to all sites, so the selector {name!r} has no plan.")
    best = solve(problem, request.limits) is not None
    least = "; ".join(
        f"{b.text!r}: at least {shown(problem, b.cost, min(problem.cost_of(b.cost, c) for c in possible))}"
        for b in request.bounds
    )
    raise HawqError(f"No {name} plan meets the budget ({least})" + ("; the selector 'pareto' can." if best else "."))


def _eigenvalues(request: Request, name: str) -> Mapping[str, float]:
    if request.eigenvalues is None:
        raise HawqError(f"The selector {name!r} needs eigenvalues: a mapping of site name -> top Hessian eigenvalue.")
    for group in request.problem.groups:
        for i in group.members:
            site = request.problem.sites[i].name
            value = request.eigenvalues.get(site)
            if value is None and len(group.bits) > 1:
                raise HawqError(
                    f"The selector {name!r} lacks the eigenvalue of {site!r}.{nearest(site, request.eigenvalues)}"
                )
            if value is not None and not 0 <= value < math.inf:
                raise HawqError(f"The top eigenvalue of {site!r} is {value}; it must be a number >= 0.")
    return request.eigenvalues


def _used(request: Request) -> Linear:
    """The shares of all budgets that a choice uses, added up; groups that no budget counts say how little Ω is."""
    problem, rows = request.problem, request.limits
    unary = [sum((row.unary[g] / limit for row, limit in rows), np.zeros(1)) for g in range(len(problem.groups))]
    pairs: dict[tuple[int, int], Floats] = {}
    for row, limit in rows:
        for key, table in row.pairs.items():
            pairs[key] = pairs.get(key, 0) + table / limit
    coupled = {g for key in pairs for g in key}
    for g, group in enumerate(problem.groups):
        if g not in coupled and not unary[g].any():
            known = np.where(np.isfinite(group.omega), group.omega, 0.0)
            unary[g] = -known / (known.max() or 1.0)
    return Linear(0.0, tuple(unary), pairs)


def _scores(problem: Problem, factors: Mapping[str, float]) -> list[Floats]:
    """``factor ||ΔW||^2`` by group; the factor is 1 unless factors are given (then 0 for sites without a choice)."""
    out: list[Floats] = []
    for group in problem.groups:
        score: list[Any] = []
        for b in group.bits:
            parts = []
            for i in group.members:
                name = problem.sites[i].name
                factor = factors.get(name, 0.0) if factors else 1.0
                parts.append(factor * problem.options[name][problem.best[i][b][0]].perturbation)
            score.append(math.fsum(parts))
        out.append(np.asarray(score, dtype=np.float64))
    return out
