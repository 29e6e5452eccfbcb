"""A cost, a selector and a score from a file of the user's own, by public names only."""

from __future__ import annotations

import itertools
import math
import sys

import numpy as np
import pytest

from hawq_lightning import HAWQ, HawqError, MeasureConfig, SelectConfig
from hawq_lightning.selection import (
    COSTS,
    SCORES,
    SELECTORS,
    LayerCost,
    Problem,
    available_costs,
    bootstrap_stability,
    format_cost,
    parse_budget,
    plan_frontier,
    read_budget,
    recost,
    register_cost,
    register_score,
    register_selector,
    select,
    table_of,
    tables_of_budget,
)
from tests.selection_networks import random_network
from tests.trainers import Classifier, loader, trainer

MINE = '''
from hawq_lightning.selection import LayerCost, Score, Unit, register_cost, register_score, register_selector


@register_cost("energy_uj")
class Energy(LayerCost):
    words, title = ("energy",), "energy of one image"
    unit = Unit({"nJ": 1e-3, "uJ": 1.0, "mJ": 1e3}, ("mJ", "uJ", "nJ"))
    forms, shown_as, examples = ("x", "%"), "%", ('"50%"', '"3uJ"')

    def of(self, problem, layer, weight_bits, activation_bits):
        return layer.macs * (0.2 + 0.01 * weight_bits * activation_bits) * 1e-3


@register_selector("last_first")
def last_first(request):
    """Lower groups from the last to the first until the budget is met."""
    choice = [len(g.bits) - 1 for g in request.problem.groups]
    for g in reversed(range(len(choice))):
        while choice[g] and not request.fits(choice):
            choice[g] -= 1
    return choice


@register_score("root_trace")
class RootTrace(Score):
    symbol, needs = "root of the trace times error", frozenset({"traces"})

    def of(self, site, candidate, mean_trace):
        return mean_trace**0.5 * candidate.perturbation
'''


@pytest.fixture(scope="module", autouse=True)
def mine(tmp_path_factory):
    """The user's file, imported as users import it, and forgotten afterwards."""
    folder = tmp_path_factory.mktemp("user")
    (folder / "my_hawq_entries.py").write_text(MINE)
    sys.path.insert(0, str(folder))
    yield __import__("my_hawq_entries")
    sys.path.remove(str(folder))
    for registry, name in ((COSTS, "energy_uj"), (SELECTORS, "last_first"), (SCORES, "root_trace")):
        registry.remove(name)


@pytest.fixture
def problem():
    return random_network(1, 5, tied=False)[0]


def energy_of(problem, bits):
    return math.fsum(x.macs * (0.2 + 0.01 * bits[x.weight] * bits[x.activation]) * 1e-3 for x in problem.layers)


def every_plan(problem):
    names = [s.name for s in problem.sites]
    for chosen in itertools.product(*(problem.candidates[n] for n in names)):
        yield {n: c.bits for n, c in zip(names, chosen)}, dict(zip(names, chosen))


def test_a_cost_of_ones_own_is_a_budget_and_the_best_plan_under_it_is_found(problem):
    at_8 = energy_of(problem, {s.name: 8 for s in problem.sites})
    for text, limit in (("60%", 0.6 * at_8), (f"{0.5 * at_8:.3f}uJ", 0.5 * at_8), (f"{at_8 / 2e3:.6f} mJ", at_8 / 2)):
        plan = select(problem, {"energy": text})
        fitting = [
            math.fsum(c.omega for c in chosen.values())
            for bits, chosen in every_plan(problem)
            if energy_of(problem, bits) <= limit * (1 + 1e-5)
        ]
        assert plan.omega == pytest.approx(min(fitting), rel=1e-9)
        assert plan.costs["energy_uj"] == pytest.approx(energy_of(problem, plan.bits))
        assert recost(plan).costs["energy_uj"] == plan.costs["energy_uj"]
    assert parse_budget({"energy_uj": 3}, problem)[0].limit == 3
    front = plan_frontier(problem, "energy_uj")
    assert front.cost[0] == pytest.approx(min(energy_of(problem, bits) for bits, _ in every_plan(problem)))


def test_messages_take_words_units_and_forms_of_the_cost(problem):
    assert "energy_uj" in available_costs(problem)
    assert format_cost(problem, "energy_uj", 1234.5).startswith("1.235 mJ = ")
    with pytest.raises(HawqError, match=r"'energy: 1nJ' cannot be met: the smallest plan is \S+ [num]J = \S+%"):
        select(problem, {"energy": "1nJ"})
    with pytest.raises(HawqError, match=r'for energy_uj use for example "50%", "3uJ" \(nearest: .3uJ.\)'):
        read_budget({"energy": "3J"})
    with pytest.raises(HawqError, match="Did you mean 'energy'"):
        read_budget({"enrgy": "50%"})
    with pytest.raises(HawqError, match=r'nearest: \{energy: "3uJ"\}'):
        read_budget("3uJ")
    with pytest.raises(HawqError, match=r'\{energy: "50%"\}'):
        read_budget([])


def test_a_cost_asks_for_the_table_that_it_needs(problem):
    @register_cost("die_mm2")
    class Area(LayerCost):
        table = "die_mm2"

        def of(self, problem, layer, weight_bits, activation_bits):
            return table_of(problem, self.table)[weight_bits] * layer.macs

    try:
        assert "die_mm2" not in available_costs(problem)
        with pytest.raises(HawqError, match=r"needs a table: give tables=\{'die_mm2'"):
            select(problem, {"die_mm2": 3})
        assert list(tables_of_budget({"die_mm2": 3})) == ["die_mm2"]
        with pytest.raises(HawqError, match="needs a table"):
            HAWQ(budget={"die_mm2": 3})
        tables = {"die_mm2": {2: 1.0, 4: 3.0, 8: 10.0}}
        HAWQ(select=SelectConfig({"die_mm2": 3}, constraints={"tables": tables}))
        whole = Problem(problem.table, problem.candidates, problem.sensitivity, tables=tables)
        plan = select(whole, {"die_mm2": 4.0 * sum(x.macs for x in whole.layers)})
        assert plan.costs["die_mm2"] == sum(tables["die_mm2"][plan.bits[x.weight]] * x.macs for x in whole.layers)
    finally:
        COSTS.remove("die_mm2")


def test_the_callback_takes_a_cost_a_selector_and_a_score_of_ones_own(tmp_path):
    hawq = HAWQ(
        (2, 4, 8), (4, 8), measure=MeasureConfig(images=32), dirpath=tmp_path, progress=False,
        select=SelectConfig({"energy": "60%"}, "last_first", "root_trace"),
    )  # fmt: skip
    trainer(tmp_path, hawq).fit(Classifier(), loader())
    plan = hawq.plan
    assert plan.selector == "last_first" and plan.settings["score"] == "root_trace"
    assert plan.costs["energy_uj"] <= 0.6 * energy_of(plan, {s.name: 8 for s in plan.sites}) * (1 + 1e-9)
    assert plan.weights[0].bits == 8 and plan.weights[-1].bits == 2
    header = (tmp_path / "frontier.csv").read_text().splitlines()[0].split(",")
    assert header[:4] == ["point", "cost", "root_trace", "omega_weights"] and "omega" in header


def test_a_selector_that_needs_a_budget_says_so():
    with pytest.raises(HawqError, match="'last_first' needs a budget"):
        SelectConfig(None, "last_first")
    with pytest.raises(HawqError, match="'last_first' is not repeated under noise; stability is for pareto and mono"):
        problem = random_network(1, 5)[0]
        bootstrap_stability(problem, select(problem, "8x", "last_first"))
    with pytest.raises(HawqError, match=r"no selector 'last_frist'.*Did you mean 'last_first'"):
        select(random_network(1, 5)[0], "8x", "last_frist")


def test_a_score_of_ones_own_is_what_the_plan_minimises(problem):
    scored = Problem(problem.table, problem.candidates, problem.sensitivity, score="root_trace")
    traces = {r.name: r.mean_trace for r in problem.sensitivity}
    plan = select(scored, {"weights": "7x", "act": "5x"})
    limits = {u.cost: u.limit for u in parse_budget({"weights": "7x", "act": "5x"}, scored)}
    elements = {s.name: (s.numel, s.kind) for s in scored.sites}

    def size(bits, kind):
        return sum(elements[n][0] * b / 8 for n, b in bits.items() if elements[n][1] == kind)

    fitting = [
        math.fsum(traces[n] ** 0.5 * c.perturbation for n, c in chosen.items())
        for bits, chosen in every_plan(scored)
        if size(bits, "weight") <= limits["weight_bytes"] and size(bits, "activation") <= limits["act_bytes"]
    ]
    score = math.fsum(traces[s.name] ** 0.5 * s.perturbation for s in plan.sites)
    assert score == pytest.approx(min(fitting), rel=1e-9)
    assert plan.omega == pytest.approx(math.fsum(s.omega for s in plan.sites))  # of the plan stays that of eq. 10
    assert plan.settings["score"] == "root_trace" and "score" not in select(problem, "7x").settings


def test_the_bootstrap_computes_the_score_anew_and_does_not_scale_it(problem):
    scored = Problem(problem.table, problem.candidates, problem.sensitivity, score="root_trace")
    name = problem.sites[0].name
    redrawn = scored.redrawn({name: 4.0})
    group = scored.group_of[0]
    np.testing.assert_allclose(redrawn.groups[group].score, 2 * scored.groups[group].score)
    np.testing.assert_allclose(redrawn.groups[group].omega, 4 * scored.groups[group].omega)
    assert 0 < min(bootstrap_stability(scored, select(scored, "7x"), bootstraps=10).share.values()) <= 1


def test_scores_that_need_traces_say_so(problem):
    with pytest.raises(HawqError, match="'root_trace' needs traces"):
        Problem(problem.table, problem.candidates, score="root_trace")
    with pytest.raises(HawqError, match=r"no score 'root_tarce'.*Did you mean 'root_trace'"):
        Problem(problem.table, problem.candidates, score="root_tarce")


@pytest.mark.parametrize("register", [register_cost, register_selector, register_score])
def test_names_are_checked(register):
    with pytest.raises(HawqError, match="is no name for a"):
        register("Energy in J")(type("Entry", (), {}))


def test_a_name_is_taken_once():
    with pytest.raises(HawqError, match="There is a cost 'bops' already"):
        register_cost("bops")(type("Entry", (), {}))
