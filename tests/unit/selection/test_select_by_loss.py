"""Budgets by loss: what they may say, and the plan that they lead to."""

from __future__ import annotations

import math

import numpy as np
import pytest

from hawq_lightning import HawqError, SelectConfig, select
from hawq_lightning.quantization import PlanLoss
from hawq_lightning.selection import (
    loss_budget,
    parse_budget,
    plan_frontier,
    select_by_loss,
    with_bootstrap_stability,
)
from tests.selection_networks import random_network


def loss_of(problem, noise: float = 0.0):
    """A loss that grows with what Ω says, and some noise that goes with the plan; predictions go by its root."""

    def measured(plan) -> PlanLoss:
        drawn = np.random.default_rng(sum(plan.bits.values())).uniform(-noise, noise)
        kl = 1e-3 * sum(s.omega or 0.0 for s in plan.sites) * (1 + drawn)
        return PlanLoss(kl, min(1.0, 0.3 * math.sqrt(kl)))

    return measured


def expected_of(problem):
    front = plan_frontier(problem)
    omega = {tuple(sorted(front.bits(i).items())): float(front.omega[i]) for i in range(len(front))}
    return lambda bits: PlanLoss(2e-4 * omega[tuple(sorted(bits.items()))], 0.01)


@pytest.mark.parametrize("seed", [0, *(pytest.param(s, marks=pytest.mark.stress) for s in (1, 2, 3))])
@pytest.mark.parametrize("word", ["kl", "agreement"])
@pytest.mark.parametrize("guess", [False, True])
def test_the_plan_keeps_the_budget_and_is_hardly_larger_than_the_smallest(seed, word, guess):
    problem = random_network(seed, 8, (2, 3, 4, 8))[0]
    measured, front = loss_of(problem, 0.02), plan_frontier(problem)
    losses = {float(front.cost[i]): measured(front.plan(i)) for i in range(len(front))}
    for share in (0.1, 0.5, 0.9):
        near = sorted(losses.values(), key=lambda x: x.kl)[int(share * (len(losses) - 1))]
        limit = near.kl if word == "kl" else 1 - near.changed - 1e-9
        plan = select_by_loss(problem, {word: limit}, measured, expected_of(problem) if guess else None)
        got = plan.settings["by_loss"][word]
        assert got["limit"] == pytest.approx(limit) and ("forecast" in got) == guess
        fits = [c for c, x in losses.items() if (x.kl <= limit if word == "kl" else 1 - x.changed >= limit)]
        assert got["measured"] <= limit if word == "kl" else got["measured"] >= limit - 1e-9
        assert plan.costs["weight_bytes"] <= 1.05 * min(fits)
        assert plan.settings["by_loss"]["plans_measured"] <= 24


@pytest.mark.parametrize(
    ("selector", "other"),
    [("pareto", {"weights": "6x"}), ("monotone", {"bops": "60%", "weight_bytes": "5x"}),
     *(pytest.param(s, o, marks=pytest.mark.stress) for s in ("pareto", "monotone", "uniform", "l2")
       for o in ({"bops": "50%"}, {"bops": "60%", "weight_bytes": "5x"}))],
)  # fmt: skip
def test_limits_on_costs_are_kept_as_well(selector, other):
    problem = random_network(1, 8, (2, 3, 4, 8))[0]
    measured = loss_of(problem)
    best = select(problem, other, selector)
    limit = measured(best).kl * 1.5  # what the limits on costs allow
    plan = select_by_loss(problem, {"kl": limit, **other}, measured, selector=selector)
    assert plan.settings["by_loss"]["kl"]["measured"] <= limit
    for u in parse_budget(other, problem):
        assert plan.costs[u.cost] <= u.limit * (1 + 1e-9)
    assert plan.costs["weight_bytes"] <= best.costs["weight_bytes"] * 1.02 and plan.selector == selector
    with pytest.raises(HawqError, match="under the other limits: the nearest has a KL of .*budget of {kl: "):
        select_by_loss(problem, {"kl": measured(best).kl / 50, **other}, measured, selector=selector)


def test_the_nearest_budget_can_be_given_back():
    problem = random_network(2, 6, (2, 4))[0]
    measured = loss_of(problem)
    for budget, read in (({"kl": 1e-12}, float), ({"agreement": 1.0}, str)):
        with pytest.raises(HawqError, match="No plan keeps") as refused:
            select_by_loss(problem, budget, measured)
        word, value = str(refused.value).split("budget of {")[1].split("}")[0].split(": ")
        plan = select_by_loss(problem, {word: read(value.strip('"'))}, measured)
        assert plan.costs["weight_bytes"] == max(plan_frontier(problem).cost)


def test_what_a_budget_by_loss_says():
    both = loss_budget({"kl": "0.02", "agreement": "99.5%", "after": "batchnorm", "bops": "50%"})
    assert (both.kl, both.changed, both.after) == (0.02, 0.005, "batchnorm")
    assert both.words() == "kl 0.02, agreement 99.5% with BatchNorm statistics measured again"
    assert loss_budget({"agreement": 0.99}).changed == 0.01 and loss_budget("8x") is None
    assert loss_budget({"weights": "8x"}) is None
    problem = random_network(0, 4, (2, 8))[0]
    assert [u.cost for u in parse_budget({"kl": 0.1, "weights": "6x"}, problem)] == ["weight_bytes"]
    assert parse_budget({"kl": 0.1}, problem) == ()


@pytest.mark.parametrize(
    ("budget", "match"),
    [
        ({"kl": -0.02}, "above 0.*nearest: {kl: 0.02}"), ({"kl": 0}, "above 0"), ({"kl": "2%"}, "nearest: {kl: 0.02}"),
        ({"kl": float("nan")}, "above 0"), ({"kl": True}, "use for example {kl: 0.02}"), ({"kl": "small"}, "0.02"),
        ({"kl": None}, "0.02"), ({"agreement": 99}, 'nearest: {agreement: "99%"}'), ({"agreement": "0%"}, "99%"),
        ({"agreement": 120}, "99%"), ({"agreement": "-1%"}, "99%"), ({"agrement": "99%"}, "'agreement'"),
        ({"kI": 0.02}, "kl"), ({"after": "batchnorm"}, "give {kl: 0.02}"),
        ({"kl": 0.1, "after": "batchnrom"}, "batchnorm"),
        ({"kl": 0.1, "bop": "50%"}, "bops"), ("kl: 0.02", "{kl: 0.02}"),
    ],
)  # fmt: skip
def test_what_is_none_is_refused_by_the_config_with_the_nearest(budget, match):
    with pytest.raises(HawqError, match=match):
        SelectConfig(budget=budget)


@pytest.mark.parametrize("selector", ["manual", "accuracy"])
def test_selectors_that_cannot_try_sizes_are_refused_at_once(selector):
    with pytest.raises(HawqError, match=f"{selector}' cannot do; use one of pareto"):
        SelectConfig(budget={"kl": 0.1}, selector=selector, bits={} if selector == "manual" else None)


def test_select_alone_cannot_measure():
    problem = random_network(0, 4, (2, 8))[0]
    with pytest.raises(HawqError, match="select_by_loss"):
        select(problem, {"kl": 0.1})
    with pytest.raises(HawqError, match="nothing of the loss"):
        select_by_loss(problem, "8x", loss_of(problem))
    with pytest.raises(HawqError, match="predictions to agree on"):
        select_by_loss(problem, {"agreement": "99%"}, lambda plan: PlanLoss(0.1))
    with pytest.raises(HawqError, match="NaN"):
        select_by_loss(problem, {"kl": 0.1}, lambda plan: PlanLoss(math.nan))


def test_redrawn_traces_choose_among_plans_of_the_same_size():
    problem = random_network(3, 6, (2, 4, 8))[0]
    plan = select_by_loss(problem, {"kl": "0.05"}, loss_of(problem))
    stable = with_bootstrap_stability(problem, plan, bootstraps=5)
    assert all(0 <= s.stability <= 1 for s in stable.sites) and stable.bits == plan.bits
    assert stable.budget == {"kl": "0.05"}
