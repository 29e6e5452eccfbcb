"""Searches by measured loss: HAQ's agent, Optuna's sampler and chance, on generated problems."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from hawq_lightning import HawqError, SelectConfig
from hawq_lightning.selection import SELECTORS, Problem, select
from tests.internals import internal
from tests.selection_networks import random_network

NAMES = ("random_search", "optuna", "haq")
search, haq = internal("selection._search"), internal("selection._haq")


def measured(problem):
    omega = {s.name: {c.bits: c.omega for c in problem.candidates[s.name]} for s in problem.sites}
    return lambda plan: math.fsum(omega[n][b] for n, b in plan.bits.items())


def need(name):
    if name == "optuna":
        pytest.importorskip("optuna")
    if name == "haq":
        pytest.importorskip("stable_baselines3")


@pytest.mark.parametrize("name", ["random_search", *(pytest.param(n, marks=pytest.mark.stress) for n in NAMES[1:])])
def test_the_best_of_its_trials_within_the_budget(name):
    need(name)
    problem = random_network(3, 3, tied=False)[0]
    tried = []

    def measure(plan):
        tried.append((measured(problem)(plan), dict(plan.bits)))
        return tried[-1][0]

    plan = select(problem, "7x", name, measure_loss=measure, trials=12, seed=1)
    assert plan.costs["w_comp"] >= 7 and plan.settings["trials"] == 12 and len(tried) <= 13
    fitting = [(loss, bits) for loss, bits in tried[1:]]  # the first is that of the most bits
    assert plan.bits == min(fitting, key=lambda x: x[0])[1] and plan.settings["loss"] == min(fitting)[0]
    assert plan.settings["measurements"] == len(tried)
    again = select(problem, "7x", name, measure_loss=measured(problem), trials=12, seed=1)
    assert again.bits == plan.bits


def test_bits_step_down_one_by_one_until_the_budget_is_met():
    problem = Problem.from_arrays(["a.weight", "b.weight", "c.weight"], (2, 4, 8), np.ones((3, 3)), [100, 100, 100])
    request = internal("selection._request").Request(
        problem, internal("selection._budget").parse_budget("5bit", problem), measure_loss=lambda plan: 0.0
    )
    trials = search.Trials(request, "haq")
    # 8 + 8 + 8, the first to 4, the second to 4: 16 bits are above 15, the third to 4
    assert trials.step_down([2, 2, 2]) == [1, 1, 1] and trials.step_down([2, 1, 0]) == [2, 1, 0]
    assert trials.step_down([2, 1, 1]) == [1, 1, 1]
    assert [trials.at(0, x) for x in (0.0, 0.3, 0.34, 0.7, 1.0)] == [0, 0, 1, 2, 2]


def test_the_agent_sees_every_group_from_0_to_1():
    problem = random_network(2, 4, tied=False)[0]
    request = internal("selection._request").Request(problem, ())
    seen = haq.features(request)
    assert seen.shape == (len(problem.groups), 9) and seen.min() == 0.0 and seen.max() == 1.0
    assert seen[:, 0].tolist() == pytest.approx(np.linspace(0, 1, len(seen)).tolist())
    assert (seen[:, 1] == [float(g.kind == "weight") for g in problem.groups]).all()


def test_what_cannot_be_is_told():
    problem = random_network(1, 2, tied=False)[0]
    for name in NAMES:
        if name == "haq":
            need(name)
        with pytest.raises(HawqError, match=f"selector '{name}' needs measure_loss"):
            select(problem, "8x", name)
        with pytest.raises(HawqError, match="cannot be met: the smallest plan"):
            select(problem, "31x", name, measure_loss=measured(problem))
        assert "loss" in SELECTORS[name].needs
    with pytest.raises(HawqError, match="trials is 0"):
        SelectConfig(trials=0)


@pytest.mark.stress
def test_optuna_finds_the_best_of_a_small_space():
    pytest.importorskip("optuna")
    problem = random_network(5, 2, tied=False)[0]
    names = [s.name for s in problem.sites]
    measure = measured(problem)
    plan = select(problem, "6x", "optuna", measure_loss=measure, trials=80)
    best = select(problem, "6x")
    assert len(list(itertools.product(*(problem.candidates[n] for n in names)))) > 80 or plan.omega == best.omega
    assert plan.omega <= 2 * best.omega + 1e-9
