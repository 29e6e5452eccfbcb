"""What the exact frontier and set B are compared with: the paper's ablations and rivals (Tables 1 to 5)."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Mapping

import numpy as np

from hawq_lightning._errors import HawqError, nearest
from hawq_lightning.selection._costs import cost_rows
from hawq_lightning.selection._linear_cost import LinearCost
from hawq_lightning.selection._milp import solve
from hawq_lightning.selection._monotone import trace_order
from hawq_lightning.selection._pareto import Floats
from hawq_lightning.selection._plans import make_plan
from hawq_lightning.selection._problem import Problem
from hawq_lightning.selection._request import Request, infeasible
from hawq_lightning.selection._selectors import best_uniform, manual, register_selector


@register_selector("direct", offers=("preview", "without_traces"))
def direct(request: Request) -> list[int]:
    """The paper's Direct rows: first and last layer at 8 bits (or their most), the rest equal."""
    problem = request.problem
    weights = [g for g, group in enumerate(problem.groups) if group.kind == "weight"]
    ends = weights[0], weights[-1]
    if problem.layers:
        order = problem.first_to_last
        ends = tuple(problem.group_of[problem.index[order[i].weight]] for i in (0, -1))  # type: ignore[assignment]
    return best_uniform(request, {g: len(problem.groups[g].bits) - 1 for g in ends}, "direct")


@register_selector("l2", offers=("without_traces",))
def l2(request: Request) -> list[int]:
    """Table 3b's ablation: least total ``||ΔW||^2``, no Hessian."""
    return request.argmin(_scores(request.problem, {}))


@register_selector("top_eigenvalue", needs=("budget", "eigenvalues"))
def top_eigenvalue(request: Request) -> list[int]:
    """Table 5's ablation: least total ``λ₁ ||ΔW||^2``."""
    return request.argmin(_scores(request.problem, _eigenvalues(request, "top_eigenvalue")))


@register_selector("hawq", needs=("budget or bits", "eigenvalues"))
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
    if used.pairs or len(request.limits) > 1 or problem.allowed_pairs:
        largest = solve(problem, request.limits, objective=used, order=order, maximize=True)
        if largest is None:
            raise HawqError(infeasible(request, order))
        return largest
    # the sweep looks for the least score: how much smaller than the largest plan
    return request.argmin([u.max() - u for u in used.unary], order)


@register_selector("max_perturbation", needs=("budget", "traces"))
def max_perturbation(request: Request) -> list[int]:
    """Table 3a's ablation: the largest Ω within set B among plans of nearly the same size (within 3%)."""
    problem, order = request.problem, trace_order(request.problem)
    sizes = []
    for b in request.upper_limits:
        row, *more = cost_rows(problem, b.cost)
        if more:  # a peak has no floor
            continue
        largest = solve(problem, request.limits, objective=row, order=order, maximize=True)
        if largest is None:
            raise HawqError(infeasible(request, order))
        sizes.append((row, min(b.limit, row(largest))))
    for share in (0.97, 0.9, 0.0):
        floors = [(row, share * limit) for row, limit in sizes]
        choice = solve(problem, request.limits, floors=floors, order=order, maximize=True)
        if choice is not None:
            return choice
    raise HawqError(infeasible(request, order))


@register_selector("random", offers=("without_traces",))
def random_plan(request: Request) -> list[int]:
    """A random plan at the budget: from the cheapest plan, random steps up for as long as any fits."""
    problem, limits = request.problem, request.upper_limits
    rows = cost_rows(problem, limits[0].cost)
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


@register_selector("accuracy", needs=("budget", "loss"), offers=("without_traces",))
def accuracy(request: Request) -> list[int]:
    """Greedy by measured loss: the search that traces replace (the kind of rival in the paper's Table 4).

    Every group alone is lowered to every width and the loss measured; then steps down by least loss per saving.

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
        start = solve(problem, (), objective=cost_rows(problem, request.upper_limits[0].cost)[0], maximize=True)
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
                if saved > 0 and (
                    not problem.allowed_pairs or problem.pairs_fit([*choice[:g], lower, *choice[g + 1 :]])
                ):
                    steps.append(((rise[g][lower] - rise[g][k]) / saved, g, lower))
        if not steps:
            # pairs that only change together: the sum of measured rises is then minimised exactly
            scores = [np.asarray(r) - min(r) for r in rise]
            exact = solve(problem, limits, scores=scores)
            assert exact is not None
            return exact
        _, g, lower = min(steps)
        choice[g] = lower
    return choice


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


def _used(request: Request) -> LinearCost:
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
            scores = np.where(np.isfinite(group.score), group.score, 0.0)
            unary[g] = -scores / (scores.max() or 1.0)
    return LinearCost(0.0, tuple(unary), pairs)


def _scores(problem: Problem, factors: Mapping[str, float]) -> list[Floats]:
    """``factor ||ΔW||^2`` by group; the factor is 1 unless factors are given (then 0 for sites without a choice)."""
    out: list[Floats] = []
    for group in problem.groups:
        score: list[float] = []
        for b in group.bits:
            parts = []
            for i in group.members:
                name = problem.sites[i].name
                factor = factors.get(name, 0.0) if factors else 1.0
                parts.append(factor * problem.candidates[name][problem.best[i][b][0]].perturbation)
            score.append(math.fsum(parts))
        out.append(np.asarray(score, dtype=np.float64))
    return out
