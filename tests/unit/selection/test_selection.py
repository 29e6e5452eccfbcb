"""Budgets, constraints, selectors, plans edited by hand, stability: what users meet."""

from __future__ import annotations

import csv
import itertools
import json
import math
import re
from collections import Counter

import numpy as np
import pytest

import hawq_lightning as hl
from hawq_lightning import Candidate, HawqError, Layer, Plan, Site, SiteTable
from hawq_lightning.selection import (
    SELECTORS,
    LatencyTable,
    Problem,
    bootstrap_stability,
    cost_of,
    frontier,
    parse_budget,
    plan_frontier,
    problem_of,
    recost,
    sample_set_b,
    save_tradeoff,
    select,
    set_b_count,
    set_b_size,
    smallest_plan,
    tradeoff,
    uniform_points,
    with_bootstrap_stability,
)
from hawq_lightning.sensitivity import Sensitivity, SiteTrace
from tests.selection_networks import random_network

NUMEL = {"a": 160, "b": 480, "c": 320}
ACTS = {"a": 40, "b": 100, "c": 60}


def small(weight_bits=(2, 4, 8), activation_bits=(4, 8), **given):
    """Three layers a -> b -> c, each with an input of its own; Ω falls by 4 a bit."""
    sites = [Site(f"{n}.weight", "weight", (n,), (16, k // 16), k, 16) for n, k in NUMEL.items()]
    sites += [Site(f"{n}.input", "activation", (n,), (k,), k) for n, k in ACTS.items()]
    layers = [
        Layer(n, "Conv2d" if n != "c" else "Linear", f"{n}.weight", f"{n}.input", 1000 * (i + 1))
        for i, n in enumerate(NUMEL)
    ]
    traces = dict(zip((s.name for s in sites), (9.0, 1.0, 3.0, 0.5, 0.1, 0.2)))
    options = {}
    for s in sites:
        bits = weight_bits if s.kind == "weight" else activation_bits
        scales = [0.1 * b if s.kind == "activation" else None for b in bits]
        moved = [s.numel * 4.0**-b for b in bits]
        options[s.name] = [Candidate(b, "affine", traces[s.name] * m, m, z) for b, m, z in zip(bits, moved, scales)]
    records = [
        SiteTrace(
            s.name, s.kind, traces[s.name] * s.numel, 0.1, 0.3 * traces[s.name] * s.numel, s.numel, traces[s.name]
        )
        for s in sites
    ]
    return Problem(
        SiteTable(tuple(sites), tuple(layers)), options, Sensitivity(tuple(records), fingerprint="f"), 77, **given
    )


@pytest.mark.parametrize(
    ("budget", "cost", "limit"),
    [
        ("12x", "weight_bytes", 960 * 4 / 12),
        (" 8 x", "weight_bytes", 480),
        ("3.5bit", "weight_bytes", 960 * 3.5 / 8),
        ("8MB", "file_bytes", 8e6),
        ("8MiB", "file_bytes", 8 * 2**20),
        ("1.5kB", "file_bytes", 1500),
        ({"bops": "50%"}, "bops", 6000 * 32),
        ({"bops": "20x"}, "bops", 6000 * 1024 / 20),
        ({"bops": "1.5k"}, "bops", 1500),
        ({"act": "7.6x"}, "act_bytes", 800 / 7.6),
        ({"act": "4bit"}, "act_bytes", 100),
        ({"weights": "1KiB"}, "weight_bytes", 1024),
    ],
)
def test_budgets(budget, cost, limit):
    (bound,) = parse_budget(budget, small())
    assert (bound.cost, bound.limit) == (cost, pytest.approx(limit))


@pytest.mark.parametrize(
    ("budget", "word"),
    [
        ("12", '"12x"'),
        (12, '"12x"'),
        ("12 times", "12x"),
        ("8 mb", '"8MB"'),
        ("50%", 'bops: "50%"'),
        ("3ms", 'latency: "3ms"'),
        ("-3x", "positive"),
        ("0x", "positive"),
        ("nanx", "number"),
        ("1e999x", "positive"),
        ("", "number"),
        (None, "needs a budget"),
        (True, "not understood"),
        ({}, "empty"),
        ({"bop": "50%"}, "'bops'"),
        ({"act": "50q"}, "7.6x"),
        ({"act": 3}, "7.6x"),
        ({"latency": "3ms"}, "latency table"),
        ({"act_peak": "3kB"}, "time steps"),
        (["12x"], "not understood"),
    ],
)
def test_bad_budgets_name_the_nearest_form(budget, word):
    with pytest.raises(HawqError) as caught:
        select(small(), budget)
    assert word in str(caught.value)


def test_mixture_bounds_both_and_weights_alone_leave_activations_at_least_omega():
    plan = select(small(), {"weights": "8x", "act": "6x"})
    assert plan.costs["weight_bytes"] <= 480 and plan.costs["act_bytes"] <= 800 / 6
    assert {s.bits for s in plan.activations} == {4, 8}
    assert {s.bits for s in select(small(), "8x").activations} == {8}


def test_costs_by_hand():
    plan = select(
        small(), selector="manual", bits={"a.weight": 8, "b.weight": 2, "c.weight": 4, "*.input": 8, "b.input": 4}
    )
    c = plan.costs
    weight = 160 * 8 + 480 * 2 + 320 * 4
    assert c["weight_bytes"] == weight / 8 and c["float_weight_bytes"] == 3840
    assert c["file_bytes"] == weight / 8 + 77 + 4 * 48
    assert c["bops"] == 1000 * 64 + 2000 * 2 * 4 + 3000 * 4 * 8 and c["bops_8bit"] == 6000 * 64
    assert c["act_bits"] == 40 * 8 + 100 * 4 + 60 * 8 and c["a_comp"] == pytest.approx(200 * 32 / 1200)
    assert c["w_comp"] == pytest.approx(960 * 32 / weight) and c["mean_weight_bits"] == pytest.approx(weight / 960)
    assert c["omega_weights"] + c["omega_activations"] == pytest.approx(plan.omega)
    assert plan["b.input"].scale == pytest.approx(0.4) and plan["a.weight"].mean_trace == 9
    assert plan.fingerprint == "f" and len(plan["a.weight"].options) == 3


def test_odd_sizes_are_padded_to_whole_bytes_in_the_file_only():
    problem = Problem.from_arrays(["a"], (1, 3), [[2.0, 1.0]], [5])
    assert [cost_of(problem, c, [1]) for c in ("weight_bytes", "file_bytes")] == [15 / 8, 2]


def test_infeasible_budgets_name_the_cheapest_plan():
    with pytest.raises(HawqError, match=r"'40x' cannot be met: the smallest plan is 240 B = 16x"):
        select(small(), "40x")
    with pytest.raises(HawqError, match=r"'100B' cannot be met: the smallest plan is 509 B"):
        select(small(), "100B")
    with pytest.raises(HawqError, match=r"'weights: 40x' cannot be met.*240 B = 16x.*'act: 6x' alone can.*100 B = 8x"):
        select(small(), {"weights": "40x", "act": "6x"})
    problem = small(pairs=[(2, 8), (4, 4), (8, 8)])
    with pytest.raises(HawqError, match=r"together.*'weights: 16x' needs.*under the others.*'act: 8x' needs"):
        select(problem, {"weights": "16x", "act": "8x"})
    for selector in ("monotone", "random", "max_perturbation"):
        with pytest.raises(HawqError, match="smallest plan is 240 B = 16x"):
            select(small(), "40x", selector)
    with pytest.raises(HawqError, match=r"No uniform plan meets the budget \('40x': at least 240 B = 16x\)"):
        select(small(), "40x", "uniform")


@pytest.mark.parametrize(
    ("budget", "found"),
    [
        ("99x", r"smallest plan is .* = (\d\S*x)"),
        ("1kB", r"smallest plan is (\S+ \wB) ="),
        ("1kB", r"smallest plan is .* = (\S+ \wiB)\."),
        ({"bops": "1%"}, r"smallest plan is .* = (\S+%)"),
        ({"bops": "1%"}, r"smallest plan is (\S+M) BOPs"),
        ({"act": "99x"}, r"smallest plan is .* = (\S+x)"),
    ],
)
def test_the_cheapest_cost_can_be_given_back_as_a_budget(budget, found):
    for seed in range(10):
        problem, _, _ = random_network(seed, 30)
        with pytest.raises(HawqError) as caught:
            select(problem, budget)
        figure = re.search(found, str(caught.value))[1]
        plan = select(problem, {next(iter(budget)): figure} if isinstance(budget, dict) else figure)
        assert max(plan.costs["w_comp"], plan.costs["a_comp"]) > 4


def test_fixed_min_bits_and_ties():
    plan = select(small(fixed={"first": 8, "last": 8}), "6.4x")
    assert (plan.bits["a.weight"], plan.bits["c.weight"]) == (8, 8)
    assert select(small(fixed={"*.weight": 4, "b.weight": 2}), "1x").bits["b.weight"] == 2
    assert min(s.bits for s in select(small(min_bits=4), "8x").weights) == 4
    assert select(small(min_bits={"b": 8}), "4x").bits["b.weight"] == 8
    tied = select(small(ties={"ends": ["a", "c"]}), "8.5x")
    assert tied.bits["a.weight"] == tied.bits["c.weight"]
    assert select(small(ties=[["*.input"]]), {"act": "5x"}).bits["a.input"] == 4


def test_device_pairs():
    problem = small(pairs={"Conv2d": [(4, 4), (8, 8)], "Linear": [[2, 8], [8, 8]]})
    for budget in ("8x", "6x", "4x", {"bops": "40%"}, {"weights": "6x", "act": "5x"}):
        bits = select(problem, budget).bits
        assert (bits["a.weight"], bits["a.input"]) in ((4, 4), (8, 8)) and (bits["c.weight"], bits["c.input"]) in (
            (2, 8),
            (8, 8),
        )
    with pytest.raises(HawqError, match=r"lacks weights of 2 bits with activations of 8 for 'c'|cannot have 2 bits"):
        select(problem, selector="manual", bits={"a.weight": 2, "b.weight": 4, "c.weight": 2, "*.input": 8})
    with pytest.raises(HawqError, match=r"device lacks the bits of layer 'a'.*3/3.*2, 4, 8"):
        small(pairs=[(3, 3)])
    with pytest.raises(HawqError, match="Did you mean 'Conv2d'"):
        small(pairs={"Conv2": [(4, 4)]})


def option(bits, omega):
    return Candidate(bits, "affine", omega, 1.0)


@pytest.mark.parametrize(
    ("build", "word"),
    [
        (lambda: small(fixed={"a.weigth": 8}), "Did you mean 'a.weight'"),
        (lambda: small(fixed={"a.weight": 3}), "only 2, 4, 8"),
        (lambda: small(fixed={"a.*t": 8, "a.w*": 4}), "keep one"),
        (lambda: small(min_bits=9), "at least 9 bits"),
        (lambda: small(ties=[["a.weight", "zz"]]), "No site matches 'zz'"),
        (lambda: small(ties=[["a", "b"]], fixed={"a.weight": 2, "b.weight": 4}), "tied sites conflict"),
        (lambda: Problem.from_arrays(["a", "a"], (2, 4), [[2, 1]] * 2, [5, 5]), "given twice: a"),
        (lambda: Problem.from_arrays(["a", "b"], (2, 4), [[2, math.nan]] * 2, [5, 5]), "'a' at 4 bits is nan"),
        (lambda: Problem.from_arrays(["a"], (2, 4), [[2, -1]], [5]), "'a' at 4 bits is -1"),
        (lambda: Problem.from_arrays(["a"], (2, 4), [[math.inf, math.inf]], [5]), "no available option"),
        (lambda: Problem.from_arrays(["a"], (2, 4), [[2, 1]], [0]), "no elements"),
        (lambda: Problem.from_arrays(["a"], (2, 4), [[2, 1]], [5, 6]), "2 rows of numel"),
        (lambda: Problem.from_arrays([], (2, 4), [], []), "no sites"),
        (lambda: Problem([Site("a", "weight", (), (5,), 5)], {}), "'a' has no candidates"),
        (lambda: Problem([Site("a", "weight", (), (5,), 5)], {"a": [option(2, 1)], "b": []}), "'b', which is no site"),
        (lambda: small(ties=["a.weight", "b.weight"]), "only one site"),
        (lambda: small(ties=[3]), "must list site names"),
        (lambda: small(ties=[["a.weight", "a.input"]]), "of a weight, a.weight, and an activation, a.input"),
        (lambda: small(ties={"x": ["c.input", "a.weight"]}), "Tie 'x' is of a weight"),
        (lambda: small(fixed=["a.weight"]), "must map site names"),
        (lambda: small(min_bits="4"), "whole number"),
        (lambda: small(min_bits={"a": "4"}), "whole number"),
        (lambda: Problem.from_arrays(["a"], (2, 9), [[2, 1]], [5]), "9 bits is out of range"),
        (lambda: select(small(), selector="manual", bits={"*": "4"}), "whole number"),
        (lambda: frontier([[1, math.nan]], [[1, 2]]), "site 0, option 1 is nan"),
        (lambda: frontier([[1, 2]], [[1, -2]]), "cost of site 0, option 1 is -2"),
        (lambda: frontier([[1, 2]], [[0, 0]]), "costs nothing"),
        (lambda: frontier([[1, 2]], [[1, 2, 3]]), "must agree"),
        (lambda: frontier([["x"]], [[1]]), "numbers"),
        (lambda: frontier([[math.inf]], [[1]]), "no available option"),
        (lambda: frontier([[1, math.inf], [math.inf, 1]], [[1, 1]] * 2, ties=[[0, 1]]), "conflict"),
        (lambda: frontier([[1]], [[1]], ties=[[0, 3]]), "site 3"),
        (lambda: frontier([], []), "no sites"),
        (lambda: set_b_size(0, 4), "at least one layer"),
        (lambda: select(small(), "8x", "paretto"), "Did you mean 'pareto'"),
        (lambda: select(small(), "8x", "manual"), "needs bits"),
        (lambda: select(small(), selector="manual", bits={"a.weight": 4}), "No bits are given for site 'b.weight'"),
        (lambda: select(small(), selector="manual", bits={"*": 5}), "cannot have 5 bits"),
        (lambda: select(small(), "16x", "manual", bits={"*": 8}), "exceeds the budget '16x'"),
        (lambda: select(small(), selector="manual", bits="/nowhere/plan.json"), "No manual plan at"),
        (lambda: select(small(), "8x", "top_eigenvalue"), "needs eigenvalues"),
        (
            lambda: select(small(), "8x", "top_eigenvalue", eigenvalues={"a.weight": 1}),
            "lacks the eigenvalue of 'b.weight'",
        ),
        (lambda: select(small(), "8x", "accuracy"), "needs measure_loss"),
        (lambda: select(small(), "8x", "accuracy", measure_loss=lambda plan: math.nan), "NaN"),
        (lambda: select(Problem.from_arrays(["a"], (2, 4), [[2, 1]], [5]), "8x", "monotone"), "sensitivity"),
        (lambda: select(Problem.from_arrays(["a"], (2, 4), [[2, 1]], [5]), {"act": "8x"}), "activation"),
        (lambda: plan_frontier(small(), "bytes"), "use one of"),
    ],
)
def test_bad_input_is_one_clear_error(build, word):
    with pytest.raises(HawqError) as caught:
        build()
    assert word in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("selector", ["max_perturbation", "hawq", "random"])
def test_two_budgets_are_both_used(selector):
    problem, _, _ = random_network(1, 30, activation_bits=(2, 4, 8))
    given = {"eigenvalues": {s.name: 1.0 + i for i, s in enumerate(problem.sites)}}
    both = select(problem, {"weights": "7x", "act": "6x"}, selector, **given)
    assert 7 <= both.costs["w_comp"] < 7.6 and 6 <= both.costs["a_comp"] < 6.6


def test_a_loose_second_budget_changes_nothing():
    problem, _, _ = random_network(1, 30, activation_bits=(8,))
    one = select(problem, "8x", "max_perturbation")
    assert select(problem, {"weights": "8x", "file": "1GB"}, "max_perturbation").bits == one.bits


def test_hawq_gives_what_no_budget_counts_the_least_omega():
    problem, _, _ = random_network(1, 30, activation_bits=(2, 4, 8))
    plan = select(problem, "7x", "hawq", eigenvalues={s.name: 1.0 + i for i, s in enumerate(problem.sites)})
    assert all(s.omega == min(o.omega for o in s.options) for s in plan.activations)
    assert {s.bits for s in plan.activations} == {8}


def test_a_plan_edited_by_hand_keeps_its_quantizer(tmp_path):
    path = tmp_path / "plan.json"
    plan = select(small(), "8x").replace(quantizer="lsq", quantizer_options={"ranges": "minmax"})
    plan.save(path)
    raw = json.loads(path.read_text())
    raw["sites"][0]["bits"] = 8 if plan.sites[0].bits != 8 else 4
    del raw["sha256"]
    path.write_text(json.dumps(raw))
    again = recost(Plan.load(path))
    assert again.bits != plan.bits and again.selector == "manual"
    assert (again.quantizer, again.quantizer_options) == ("lsq", {"ranges": "minmax"})


def test_rows_of_different_lengths_lack_the_last_options():
    found = frontier([[2, 1], [5]], [[1, 2], [3]])
    assert list(zip(found.cost, found.omega)) == [(4, 7), (5, 6)] and found.options(-1) == [1, 0]


def test_every_selector_meets_the_budget_and_pareto_is_the_best():
    problem, _, _ = random_network(1, 30, activation_bits=(8,))
    rng = np.random.default_rng(0)
    given = {
        "eigenvalues": {s.name: float(rng.uniform(1, 5)) for s in problem.sites},
        "measure_loss": lambda plan: plan.omega / 2,
        "bits": None,
        "trials": 6,
    }
    plans = {}
    for name in SELECTORS:
        if name == "manual":
            continue
        plan = plans[name] = select(problem, "7x", name, seed=3, **given)
        assert plan.selector == name and plan.costs["w_comp"] >= 7
        assert plan.omega >= plans["pareto"].omega * (1 - 1e-12)
        assert Plan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan
    # these go to the budget's edge
    for name in ("pareto", "monotone", "l2", "top_eigenvalue", "hawq", "random", "accuracy", "max_perturbation"):
        assert plans[name].costs["w_comp"] < 7.6, name
    assert plans["max_perturbation"].omega > 1.2 * plans["monotone"].omega
    assert len({s.bits for s in plans["uniform"].weights}) == 1
    ends = [plans["direct"][problem.layers[i].weight].bits for i in (0, -1)]
    assert ends == [8, 8] and plans["direct"].bits != plans["uniform"].bits
    assert plans["accuracy"].settings["measurements"] > 30 and plans["accuracy"].settings["selection_seconds"] > 0
    assert plans["random"].bits != select(problem, "7x", "random", seed=4).bits
    assert plans["random"].bits == select(problem, "7x", "random", seed=3).bits
    moved = {s.name: s.perturbation for s in plans["l2"].sites}
    assert math.fsum(moved.values()) <= math.fsum(s.perturbation for s in plans["pareto"].sites)


def test_accuracy_finds_the_exact_plan_when_loss_is_half_omega():
    problem = small(activation_bits=(8,))
    for budget in ("4x", "6x", "10x", "16x"):
        greedy = select(problem, budget, "accuracy", measure_loss=lambda plan: plan.omega / 2)
        assert greedy.omega <= 3 * select(problem, budget).omega


def test_hawq_orders_by_eigenvalue_over_elements():
    eigenvalues = {"a.weight": 1.0, "b.weight": 30.0, "c.weight": 4.0}
    problem = small(activation_bits=(8,))
    plan = select(problem, "7x", "hawq", eigenvalues=eigenvalues)
    assert plan.bits["a.weight"] <= plan.bits["c.weight"] <= plan.bits["b.weight"]
    with pytest.raises(HawqError, match=r"forbids more bits for 'a.weight'"):
        select(problem, selector="hawq", eigenvalues=eigenvalues, bits={"a.weight": 8, "b.weight": 4, "c.weight": 4})


def test_manual_from_files(tmp_path):
    bits = {"a.weight": 8, "b.weight": 2, "c.weight": 4, "*.input": 8}
    first = select(small(), "5x", "manual", bits=bits)
    first.save(tmp_path / "plan.json")
    (tmp_path / "bits.json").write_text(json.dumps(bits))
    assert select(small(), "5x", "manual", bits=tmp_path / "plan.json").bits == first.bits
    assert select(small(), "5x", "manual", bits=str(tmp_path / "bits.json")).bits == first.bits


@pytest.mark.filterwarnings("ignore:The plan at .* was changed:UserWarning")
def test_a_plan_edited_by_hand_is_recosted_and_checked(tmp_path):
    path = tmp_path / "plan.json"
    plan = select(small(), "8x")
    plan.save(path)
    assert recost(Plan.load(path)) == plan
    raw = json.loads(path.read_text())
    for site in raw["sites"]:
        if site["name"] == "a.weight":
            site["bits"] = 2
        if site["name"] == "b.input":
            site["bits"] = 4
    path.write_text(json.dumps(raw))
    edited = recost(Plan.load(path))
    assert recost(edited).sites == edited.sites
    steady = with_bootstrap_stability(small(), plan, bootstraps=5).replace(
        costs=dict(plan.costs) | {"act_peak_bytes": 7.0}
    )
    assert recost(steady) == steady
    expected = select(small(), selector="manual", bits=plan.bits | {"a.weight": 2, "b.input": 4})
    assert edited.sites == expected.sites and edited.selector == "manual"
    assert edited.costs == pytest.approx(dict(expected.costs))
    assert recost(Plan.load(path), small()).sites == expected.sites
    raw["sites"][0]["bits"] = 5
    path.write_text(json.dumps(raw))
    with pytest.raises(HawqError, match=r"'a.weight' cannot have 5 bits; it has 2, 4, 8; the nearest is 4"):
        recost(Plan.load(path))
    with pytest.raises(HawqError, match="Tied sites must have the same bits"):
        recost(select(small(), selector="manual", bits={"a.weight": 2, "*": 4}), small(ties=[["a", "b"]]))


def test_a_plan_holds_its_whole_problem():
    problem, _, _ = random_network(2, 12, tied=False)
    plan = select(problem, "6x")
    again = problem_of(plan)
    assert list(plan_frontier(again, "bops").omega) == list(plan_frontier(problem, "bops").omega)
    assert select(again, "9x").bits == select(problem, "9x").bits


def test_frontier_csv(tmp_path):
    problem, _, _ = random_network(4, 12)
    front = plan_frontier(problem)
    front.to_csv(tmp_path / "frontier.csv", max_rows=None)
    rows = list(csv.DictReader((tmp_path / "frontier.csv").read_text().splitlines()))
    assert len(rows) == len(front)
    assert [float(r["cost"]) for r in rows] == pytest.approx(list(front.cost))
    assert [float(r["omega"]) for r in rows] == pytest.approx(list(front.omega))
    middle = rows[len(rows) // 2]
    assert {s.name: int(middle[s.name]) for s in problem.sites} == front.bits(len(rows) // 2)
    assert float(middle["w_comp"]) == pytest.approx(32 / float(middle["mean_weight_bits"]))
    for i in (0, len(front) // 2, -1):
        chosen = [problem.candidates[s.name][k] for s, k in zip(problem.sites, front.options(i))]
        assert {s.name: o.bits for s, o in zip(problem.sites, chosen)} == front.bits(i)
        assert math.fsum(o.omega for o in chosen) == pytest.approx(front.omega[i])
    front.to_csv(tmp_path / "short.csv", max_rows=10)
    short = list(csv.DictReader((tmp_path / "short.csv").read_text().splitlines()))
    assert len(short) == 10 and short[0] == rows[0] and short[-1] == rows[-1]


def test_uniform_points_lie_on_or_above_the_frontier():
    problem = small()
    front = plan_frontier(problem)
    points = uniform_points(problem)
    assert [b for b, _, _ in points] == [2, 4, 8] and [c for _, c, _ in points] == [240, 480, 960]
    assert all(front.omega[front.best(c)] <= o for _, c, o in points)


def test_numbers_behind_figure_4(tmp_path):
    problem, _, _ = random_network(8, 10, (1, 2, 4, 8), (8,))
    plan = select(problem, "7x")
    rows = tradeoff(problem, plans={"chosen": plan}, points=50, samples=200)
    by = {}
    for r in rows:
        by.setdefault(r["series"], []).append((r["cost"], r["omega"]))
    assert set(by) == {"frontier", "set B frontier", "set B", "uniform", "plan"}
    assert by["plan"] == [(plan.costs["weight_bytes"], pytest.approx(plan.omega))]
    assert len(by["uniform"]) == 4 and len(by["set B"]) == 200 and len(by["frontier"]) == 50
    front = plan_frontier(problem)
    inside = tradeoff(problem, points=10**6, samples=0)
    best = sorted((r["cost"], r["omega"]) for r in inside if r["series"] == "set B frontier")
    for cost, omega in by["set B"]:
        reached = min(o for c, o in best if c <= cost)
        assert front.omega[front.best(cost)] <= reached * (1 + 1e-12) and reached <= omega * (1 + 1e-12)
    save_tradeoff(rows, tmp_path / "tradeoff.csv")
    assert len(list(csv.DictReader((tmp_path / "tradeoff.csv").read_text().splitlines()))) == len(rows)


def test_members_of_set_b_are_drawn_evenly():
    assert set_b_count([(1, 2, 4, 8)] * 50) == 23426
    widths = [(2, 4), (2, 4, 8), (4, 8)]
    members = [p for p in itertools.product(*widths) if list(p) == sorted(p)]
    assert set_b_count(widths) == len(members)
    drawn = Counter(tuple(w[k] for w, k in zip(widths, p)) for p in sample_set_b(widths, 6000, seed=1))
    assert set(drawn) == set(members)
    assert max(abs(n - 6000 / len(members)) for n in drawn.values()) < 5 * math.sqrt(6000 / len(members))


def test_of_equal_widths_the_code_with_the_least_omega_counts():
    sites = [Site("a.weight", "weight", ("a",), (8,), 8, 1)]
    options = {
        "a.weight": [
            Candidate(2, "affine", 3.0, 3.0),
            Candidate(2, "midrise", 2.0, 2.0),
            Candidate(8, "affine", 1.0, 1.0),
        ]
    }
    front = plan_frontier(Problem(sites, options))
    assert list(front.omega) == [2, 1] and front.options(0) == [1] and front.plan(0)["a.weight"].code == "midrise"


def test_latency_table(tmp_path):
    path = tmp_path / "table.csv"
    rows = ["layer,shape,type,weight_bits,activation_bits,us"]
    rows += [f"a,,,{w},{a},{100 * w + a}" for w in (2, 4, 8) for a in (4, 8)]
    rows += [f",16x30,,{w},,{200 * w}" for w in (4, 8)]  # b: the device has no 2 bits there
    rows += [f",(16 20),Linear,{w},8,{300 * w}".replace(" ", "x") for w in (2, 4, 8)]  # c: activations at 8 only
    path.write_text("\n".join(rows))
    problem = small(latency=path)
    best = {}
    for limit in (3.5, 4.6, 6.0):
        plan = select(problem, {"latency": f"{limit}ms"})
        bits = plan.bits
        ms = (100 * bits["a.weight"] + bits["a.input"] + 200 * bits["b.weight"] + 300 * bits["c.weight"]) / 1000
        assert plan.costs["latency_ms"] == pytest.approx(ms) and ms <= limit
        assert bits["b.weight"] in (4, 8) and bits["c.input"] == 8
        best[limit] = plan.omega
    assert best[3.5] > best[4.6] > best[6.0]
    with pytest.raises(HawqError, match=r"smallest plan is 1.604 ms"):
        select(problem, {"latency": "1ms"})
    both = select(problem, {"latency": "4.6ms", "weights": "8x"})
    assert both.costs["latency_ms"] <= 4.6 and both.costs["w_comp"] >= 8
    assert parse_budget({"latency": "50%"}, problem)[0].limit == pytest.approx((808 + 1600 + 2400) / 2000)


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("layer,weight_bits,ms\na,2,1\n", "no latency for layer 'b'"),
        ("layer,weight_bits,ms\na,two,1\n", "Line 2"),
        ("layer,weight_bits,ms\na,2,-1\n", "no latency"),
        ("layer,weight_bits\na,2\n", "weight_bits and ms"),
        ("layer,weight_bits,ms\n", "no rows"),
        ("layer,weight_bits,ms\na,2,1\na,2,3\n", "contradicts"),
    ],
)
def test_bad_latency_tables(tmp_path, text, word):
    path = tmp_path / "table.csv"
    path.write_text(text)
    with pytest.raises(HawqError) as caught:
        select(small(latency=path), {"latency": "3ms"})
    assert word in str(caught.value)
    with pytest.raises(HawqError, match="cannot be read"):
        LatencyTable.load(tmp_path / "none.csv")


def test_peak_activation_memory_is_a_row_a_time_step():
    steps = [{"a.input": 40, "b.input": 100}, {"b.input": 100, "c.input": 60, "skip": 10}, {"c.input": 60}]
    problem = small(weight_bits=(8,), steps=steps)
    plan = select(problem, {"act_peak": "130B"})
    b = plan.bits
    peak = max(40 * b["a.input"] + 100 * b["b.input"], 100 * b["b.input"] + 60 * b["c.input"] + 320) / 8
    assert plan.costs["act_peak_bytes"] == peak <= 130
    fitting = []
    for x, y, z in np.ndindex(2, 2, 2):
        bits = {"a.input": (4, 8)[x], "b.input": (4, 8)[y], "c.input": (4, 8)[z], "*.weight": 8}
        other = select(problem, selector="manual", bits=bits)
        if other.costs["act_peak_bytes"] <= 130:
            fitting.append(other.omega)
    assert plan.omega == pytest.approx(min(fitting)) and 0 < len(fitting) < 8
    with pytest.raises(HawqError, match="smallest plan is 120 B"):
        select(problem, {"act_peak": "100B"})
    with pytest.raises(HawqError, match="maximum over time steps"):
        plan_frontier(problem, "act_peak_bytes")


def test_extra_costs():
    energy = {"a.weight": {2: 1.0, 4: 2.0}, "b.weight": {2: 3.0, 4: 4.0, 8: 5.0}}  # a: 8 bits are not available
    problem = small(extra_costs={"energy": energy})
    plan = select(problem, {"energy": 6.0, "weights": "4x"})
    assert plan.costs["energy"] <= 6 and plan.bits["a.weight"] in (2, 4) and plan.bits["c.weight"] == 8
    with pytest.raises(HawqError, match="smallest plan is 4"):
        select(problem, {"energy": 3.0})


def bootstrapped(noise, count=40):
    """Three sites that compete for bits, measured on the same images; ``noise`` is each image's own."""
    rng = np.random.default_rng(0)
    shared = rng.uniform(0.5, 1.5, count)
    rows = {}
    for n, m in (("a", 1.2), ("b", 1.0), ("c", 1.1)):
        drawn = shared * np.exp(noise * rng.normal(size=count))
        rows[n] = list(m * drawn / drawn.mean())
    records = []
    for n, r in rows.items():
        trace = float(np.mean(r))
        records.append(SiteTrace(n, "weight", trace, 0.0, float(np.std(r) / math.sqrt(count)), 100, trace / 100))
    sites = [Site(n, "weight", (n,), (100,), 100, 1) for n in rows]
    options = {r.name: [option(b, r.trace * 4.0**-b) for b in (2, 4, 8)] for r in records}
    return Problem(sites, options, Sensitivity(tuple(records), rows=rows))


def test_stability_counts_bootstraps_that_pick_the_same_bits():
    calm, wild = bootstrapped(0.0), bootstrapped(1.0)
    plan = with_bootstrap_stability(calm, select(calm, "6x"), bootstraps=50)
    assert all(s.stability == 1.0 for s in plan.sites) and plan.settings["bootstrap_regret95"] == pytest.approx(
        0, abs=1e-12
    )
    shaky = bootstrap_stability(wild, select(wild, "6x"), bootstraps=50)
    assert min(shaky.share.values()) < 1 and shaky.regret95 > 0
    assert shaky == bootstrap_stability(wild, select(wild, "6x"), bootstraps=50)
    assert shaky != bootstrap_stability(wild, select(wild, "6x"), bootstraps=50, seed=1)
    # by hand: redraw rows, scale Ω, take the best of the plans that fit
    by_record = small(activation_bits=(8,))
    found = bootstrap_stability(by_record, select(by_record, "8x", "monotone"), bootstraps=50)
    assert 0 < min(found.share.values()) <= 1
    with pytest.raises(HawqError, match="'uniform' is not repeated"):
        bootstrap_stability(wild, select(wild, "6x", "uniform"))


def test_a_tie_is_a_list():
    with pytest.raises(HawqError, match="A tie is a list"):
        hl.frontier([[3, 1]], [[1, 2]], ties=[0])


def test_scores_by_quadratic_forms_choose_by_them_and_need_them(tmp_path):
    numbers = {"bits": 2, "code": "affine", "perturbation": 1.0}
    table = SiteTable(tuple(Site(n, "weight", (n,), (10, 10), 100, 10) for n in "ab"), ())
    omega, q = {"a": 9.0, "b": 1.0}, {"a": 0.01, "b": 2.0}

    def weighed(forms: bool) -> dict[str, tuple[Candidate, ...]]:
        return {
            n: (
                Candidate(omega=omega[n], **numbers, q=q[n] if forms else None),
                Candidate(8, "affine", 0.0, 0.0, q=0.0 if forms else None),
            )
            for n in "ab"
        }

    low = {}
    for score in ("omega", "rounding", "both"):
        problem = Problem(table, weighed(True), score=score)
        low[score] = min(select(problem, "6x").bits.items(), key=lambda x: x[1])[0]
    assert low == {"omega": "b", "rounding": "a", "both": "a"}  # 0.3 against 1.4 for both
    for score in ("rounding", "both"):
        with pytest.raises(HawqError, match="'a' has none at 2 bits: measure with.*quadratic_forms=True"):
            Problem(table, weighed(False), score=score)
    plan = select(Problem(table, weighed(True), score="rounding"), "6x")
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan and problem_of(plan).score == "rounding"


@pytest.mark.parametrize("seed", range(6))
def test_the_smallest_plan_by_loss_is_that_of_trying_all(seed):
    rng = np.random.default_rng(seed)
    front = plan_frontier(random_network(seed, 8, (2, 3, 4, 8))[0])
    order = np.argsort(front.cost, kind="stable")
    losses = {int(i): float(front.omega[i]) ** 1.5 * float(rng.uniform(0.98, 1.02)) for i in order}
    points = {tuple(sorted(front.bits(i).items())): i for i in losses}
    tried: list[int] = []

    def measured(plan):
        tried.append(points[tuple(sorted(plan.bits.items()))])
        return losses[tried[-1]]

    def expected(bits):
        return 0.3 * float(front.omega[points[tuple(sorted(bits.items()))]])

    for share in (0.1, 0.5, 0.9):
        limit = sorted(losses.values())[int(share * (len(losses) - 1))]
        least = min(front.cost[i] for i in losses if losses[i] <= limit)
        for guess in (None, expected):
            tried.clear()
            plan, loss = smallest_plan(front, limit, measured, guess)
            assert loss <= limit and loss == plan.settings["measured_loss"]
            assert plan.costs["weight_bytes"] <= 1.05 * least, (share, guess)
            assert len(tried) <= 14
    plan, _ = smallest_plan(front, limit, measured, max_cost=float(np.median(front.cost)) * 10)
    with pytest.raises(HawqError, match="the nearest has"):
        smallest_plan(front, min(losses.values()) / 2, measured, expected)
    with pytest.raises(HawqError, match="No plan costs so little"):
        smallest_plan(front, limit, measured, max_cost=0.0)
