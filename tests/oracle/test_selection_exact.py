"""The frontier and the integer program against brute force, against each other, and against SciPy called directly."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy.optimize import Bounds, LinearConstraint, milp

from hawq_lightning import HawqError
from hawq_lightning.selection import (
    Block,
    Problem,
    cost_of,
    cost_rows,
    frontier,
    group_frontier,
    monotone_frontier,
    plan_frontier,
    select,
    set_b,
    set_b_size,
    solve,
    sweep,
    trace_order,
)
from tests.selection_networks import random_network


def pareto(points):
    best, out = math.inf, []
    for cost, omega in sorted(points):
        if omega < best:
            best = omega
            out.append((cost, omega))
    return out


def on_device(problem, pairs, bits):
    return all((bits[x.weight], bits[x.activation]) in pairs[x.type] for x in problem.layers if x.type in (pairs or {}))


def brute_force(problem, ties, pairs):
    """Every allowed plan as (bits by site name, Ω), from the definitions and nothing of the solver's."""
    names = [s.name for s in problem.sites]
    for options in itertools.product(*(problem.candidates[n] for n in names)):
        bits = {n: o.bits for n, o in zip(names, options)}
        if any(len({bits[n] for n in tie}) > 1 for tie in ties):
            continue
        if not on_device(problem, pairs, bits):
            continue
        yield bits, math.fsum(o.omega for o in options)


def cost_by_definition(problem, name, bits):
    weights = [s for s in problem.sites if s.kind == "weight"]
    if name == "weight_bytes":
        return sum(s.numel * bits[s.name] for s in weights) / 8
    if name == "file_bytes":
        return 100 + sum(math.ceil(s.numel * bits[s.name] / 8) + 4 * s.channels for s in weights)
    if name == "act_bytes":
        return sum(s.numel * bits[s.name] for s in problem.sites if s.kind == "activation") / 8
    return sum(x.macs * bits[x.weight] * bits[x.activation] for x in problem.layers)


def test_frontier_equals_brute_force():
    rng = np.random.default_rng(0)
    for trial in range(40):
        sites, width = int(rng.integers(1, 9)), int(rng.integers(1, 5))
        omega = rng.integers(0, 12, (sites, width)).astype(float)  # many ties in value
        cost = rng.integers(0, 9, (sites, width)).astype(float) + np.eye(1, width)[0]
        omega[rng.random(omega.shape) < 0.1] = np.inf
        omega[:, 0] = np.where(np.isinf(omega[:, 0]), 5.0, omega[:, 0])
        ties = [[0, sites - 1]] if trial % 3 == 0 and sites > 1 else None
        found = frontier(omega, cost, ties)
        plans = [
            (sum(cost[i, k] for i, k in enumerate(p)), sum(omega[i, k] for i, k in enumerate(p)))
            for p in itertools.product(range(width), repeat=sites)
            if ties is None or p[0] == p[-1]
        ]
        expected = pareto([p for p in plans if math.isfinite(p[1])])
        assert list(zip(found.cost, found.omega)) == expected
        for i in range(len(found)):
            chosen = found.options(i)
            assert sum(cost[j, k] for j, k in enumerate(chosen)) == found.cost[i]
            assert sum(omega[j, k] for j, k in enumerate(chosen)) == found.omega[i]


def test_one_budget_by_the_bounded_sweep_equals_the_frontier():
    rng = np.random.default_rng(7)
    checked = 0
    for _ in range(60):
        sites, width = int(rng.integers(1, 30)), int(rng.integers(1, 6))
        omega = rng.integers(0, 12, (sites, width)) * 10.0 ** rng.integers(-9, 9)
        cost = rng.integers(1, 9, (sites, width)) * 10.0 ** rng.integers(-3, 9)
        blocks = [Block((i,), np.arange(width)[:, None], cost[i], omega[i]) for i in range(sites)]
        front = frontier(omega, cost)
        for limit in (front.cost[0] * 0.999, front.cost[0], *rng.uniform(front.cost[0], front.cost[-1] * 1.1, 4)):
            found = sweep(blocks, sites, cap=limit * (1 + 1e-12), last=True)  # sums differ in their last digit
            if limit < 0.9995 * front.cost[0]:
                assert len(found) == 0
                continue
            best = front.best(limit * (1 + 1e-12))
            assert found.omega[-1] == pytest.approx(front.omega[best], rel=1e-12)
            assert found.cost[-1] == pytest.approx(front.cost[best], rel=1e-12)
            checked += 1
    assert checked > 200


@pytest.mark.parametrize("cost", ["weight_bytes", "file_bytes", "act_bytes", "bops"])
@pytest.mark.parametrize("device", [False, True])
def test_problem_frontier_equals_brute_force_with_ties_and_pairs(cost, device):
    for seed in range(4):
        problem, ties, pairs = random_network(seed, 4, tied=seed % 2 == 0, device=device)
        assert len(problem.sites) <= 8
        plans = list(brute_force(problem, ties, pairs))
        expected = pareto([(cost_by_definition(problem, cost, b), o) for b, o in plans])
        found = plan_frontier(problem, cost)
        assert found.cost == pytest.approx([c for c, _ in expected], rel=1e-12)
        assert found.omega == pytest.approx([o for _, o in expected], rel=1e-12)
        for i in range(len(found)):
            bits = found.bits(i)
            assert bits in [b for b, _ in plans]
            assert cost_by_definition(problem, cost, bits) == pytest.approx(found.cost[i])
            assert found.plan(i).costs[cost] == pytest.approx(found.cost[i])


def test_several_budgets_equal_brute_force():
    rng = np.random.default_rng(1)
    names = {"weights": "weight_bytes", "bops": "bops", "act_bytes": "act_bytes"}
    met = 0
    for seed in range(6):
        problem, ties, pairs = random_network(seed, 4, device=seed % 2 == 1)
        plans = list(brute_force(problem, ties, pairs))
        for _ in range(3):
            at = plans[int(rng.integers(len(plans)))][0]
            limits = {k: cost_by_definition(problem, c, at) * rng.uniform(0.8, 1.3) for k, c in names.items()}
            budget = {"weight_bytes": limits["weights"], "bops": limits["bops"], "act_bytes": limits["act_bytes"]}
            fitting = [
                o for b, o in plans if all(cost_by_definition(problem, c, b) <= limits[k] for k, c in names.items())
            ]
            if not fitting:
                with pytest.raises(HawqError, match="budget"):
                    select(problem, budget)
                continue
            met += 1
            plan = select(problem, budget)
            assert plan.omega == pytest.approx(min(fitting), rel=1e-9)
            assert all(plan.costs[c] <= limits[k] * (1 + 1e-9) for k, c in names.items())
    assert met >= 6


@pytest.mark.parametrize("seed", range(20))
def test_sweep_equals_integer_program_on_large_problems(seed):
    """20 problems of 50 to 160 sites, 10 random budgets each; ties everywhere, a device's pairs on every other one."""
    rng = np.random.default_rng(100 + seed)
    device = seed % 2 == 1
    problem, ties, pairs = random_network(
        seed, 28 + int(rng.integers(0, 56)), (2, 3, 4, 8) if device else (2, 4, 8), device=device
    )
    assert 45 <= len(problem.sites) <= 160 and bool(problem.allowed_pairs) == device
    row = cost_rows(problem, "weight_bytes")[0]
    front = group_frontier(problem, row)
    assert front.factor == 1
    checked = 0
    for limit in rng.uniform(front.cost[0], front.cost[-1], 10):
        choice = solve(problem, [(row, limit)])
        assert choice is not None and row(choice) <= limit
        best = front.omega[front.best(limit)]
        assert problem.omega_of(choice) == pytest.approx(best, rel=1e-9)
        only = group_frontier(problem, row, cap=limit, last=True)
        assert only.omega[-1] == best and problem.omega_of(only.options(-1)) == pytest.approx(best)
        bits = {
            s.name: problem.groups[problem.group_of[i]].bits[choice[problem.group_of[i]]]
            for i, s in enumerate(problem.sites)
        }
        assert all(len({bits[n] for n in tie}) == 1 for tie in ties)
        assert on_device(problem, pairs, bits)
        checked += 1
    assert checked == 10


def test_frontier_equals_scipy_called_directly():
    rng = np.random.default_rng(5)
    for _ in range(3):
        sites, width = 60, 4
        cost = rng.integers(1, 500, sites)[:, None] * np.array([1, 2, 4, 8])
        omega = np.exp(rng.normal(0, 1, sites))[:, None] * 4.0 ** -np.array([1, 2, 4, 8]) * 1e3
        ties = [[0, 7, 9], [3, 4]]
        found = frontier(omega, cost, ties)
        one_hot = np.kron(np.eye(sites), np.ones(width))
        same = [
            np.eye(sites * width)[a * width + k] - np.eye(sites * width)[b * width + k]
            for tie in ties
            for a, b in itertools.pairwise(tie)
            for k in range(width)
        ]
        for limit in rng.uniform(found.cost[0], found.cost[-1], 4):
            answer = milp(
                omega.ravel(),
                integrality=np.ones(sites * width),
                bounds=Bounds(0, 1),
                constraints=[
                    LinearConstraint(one_hot, 1, 1),
                    LinearConstraint(np.asarray(same), 0, 0),
                    LinearConstraint(cost.ravel()[None], -np.inf, np.floor(limit)),
                ],
                options={"mip_rel_gap": 0.0},
            )
            assert answer.fun == pytest.approx(found.omega[found.best(limit)], rel=1e-7)


def test_integer_program_resolves_small_optima_beside_huge_options():
    """HiGHS' absolute gap would accept a plan that is 50% worse when one option's Ω is 1e12 times the optimum."""
    rng = np.random.default_rng(3)
    omega = np.exp(rng.normal(0, 1, 40))[:, None] * 4.0 ** -np.arange(1, 9)
    omega[:, 0] *= 1e12
    problem = Problem.from_arrays(
        [f"w{i}" for i in range(40)], range(1, 9), omega, [int(x) for x in rng.integers(10, 90, 40)]
    )
    row = cost_rows(problem, "weight_bytes")[0]
    front = group_frontier(problem, row)
    for share in (0.7, 0.9):
        limit = front.cost[-1] * share
        choice = solve(problem, [(row, limit)])
        assert problem.omega_of(choice) == pytest.approx(front.omega[front.best(limit)], rel=1e-9)


def resnet152():
    shapes, fan = [(64, 3, 7, 7)], 64
    for width, blocks in ((64, 3), (128, 8), (256, 36), (512, 3)):
        for block in range(blocks):
            shapes += [(width, fan, 1, 1), (width, width, 3, 3), (width * 4, width, 1, 1)]
            if block == 0:
                shapes.append((width * 4, fan, 1, 1))
            fan = width * 4
    return [int(np.prod(s)) for s in (*shapes, (1000, 2048))]


def test_resnet152_with_8_widths_is_exact():
    numel = np.asarray(resnet152())
    rng = np.random.default_rng(0)
    omega = (
        np.exp(rng.normal(0, 2, len(numel)))[:, None]
        * 4.0 ** -np.arange(1, 9)
        * np.exp(rng.normal(0, 0.1, (len(numel), 8)))
    )
    found = frontier(omega, numel[:, None] * np.arange(1, 9))  # how long: benchmarks/selection.py
    assert len(numel) == 156 and found.factor == 1 and len(found) > 1000


def test_memory_bound_keeps_its_stated_factor():
    rng = np.random.default_rng(2)
    cost = rng.integers(1, 10**6, 24)[:, None] * np.arange(1, 9)
    omega = np.exp(rng.normal(0, 2, 24))[:, None] * 4.0 ** -np.arange(1, 9)
    exact, thin = frontier(omega, cost), frontier(omega, cost, max_points=1000)
    assert exact.factor == 1 and len(thin) <= 1000 and 1 < thin.factor < 3
    ratios = [thin.omega[thin.best(c)] / o for c, o in zip(exact.cost, exact.omega)]
    assert 1 < max(ratios) <= thin.factor
    for i in range(0, len(thin), 17):
        chosen = thin.options(i)
        assert sum(cost[j, k] for j, k in enumerate(chosen)) == thin.cost[i]
    # select() falls back to the integer program and stays exact
    names = [f"w{i}" for i in range(24)]
    small = Problem.from_arrays(names, range(1, 9), omega, [int(c) for c in cost[:, 0]], max_points=1000)
    plan = select(small, "10x")
    assert plan.omega == pytest.approx(exact.omega[exact.best(sum(cost[:, 0]) * 3.2)], rel=1e-9)


def test_set_b_size_and_frontier():
    assert set_b_size(50, 4) == 23426
    assert sum(1 for _ in set_b(50, (1, 2, 4, 8))) == 23426
    for seed in range(5):
        problem, _, _ = random_network(seed, 7, (1, 2, 4, 8), (8,), tied=False)
        order = trace_order(problem)[0]
        by_trace = [problem.sites[g].name for g in order]
        assert sorted(r.mean_trace for r in problem.sensitivity if r.kind == "weight") == [
            problem.sensitivity[n].mean_trace for n in by_trace
        ]
        rest = math.fsum(problem.candidates[s.name][0].omega for s in problem.sites if s.kind == "activation")
        points = []
        for bits in set_b(7, (1, 2, 4, 8)):
            options = [next(o for o in problem.candidates[n] if o.bits == b) for n, b in zip(by_trace, bits)]
            points.append(
                (
                    sum(problem.sites[g].numel * b for g, b in zip(order, bits)) / 8,
                    rest + math.fsum(o.omega for o in options),
                )
            )
        found = monotone_frontier(problem, cost_rows(problem, "weight_bytes")[0], order)
        expected = pareto(points)
        assert found.cost == pytest.approx([c for c, _ in expected])
        assert found.omega == pytest.approx([o for _, o in expected], rel=1e-12)
        for i in range(len(found)):
            choice = found.choice(i)
            assert cost_of(problem, "weight_bytes", choice) == pytest.approx(found.cost[i])
            bits = [problem.groups[g].bits[choice[g]] for g in order]
            assert bits == sorted(bits)


def test_set_b_by_the_integer_program_equals_its_frontier():
    problem, _, _ = random_network(3, 40, (1, 2, 4, 8), (8,))
    row, order = cost_rows(problem, "weight_bytes")[0], trace_order(problem)
    front = monotone_frontier(problem, row, order[0])
    for share in (0.2, 0.4, 0.6):
        limit = float(np.quantile(front.cost, share))
        choice = solve(problem, [(row, limit)], order=order)
        best = front.omega[np.searchsorted(front.cost, limit, side="right") - 1]
        assert problem.omega_of(choice) == pytest.approx(best, rel=1e-9)


def test_equal_mean_traces_keep_network_order_and_tied_sites_pool_theirs():
    omega = [[4.0, 2.0, 1.0]] * 4
    problem = Problem.from_arrays(
        list("abcd"), (2, 4, 8), omega, [10, 10, 30, 10], mean_trace=[1, 1, 5, 2], ties=[["c", "d"]]
    )
    assert problem.mean_traces() == [1, 1, (5 * 30 + 2 * 10) / 40]
    assert trace_order(problem)[0] == [0, 1, 2]


def test_omega_and_frontier_ignore_relu_rescaling_but_set_b_does_not():
    """W1 -> aW1, W2 -> W2/a leaves Ω alone and moves mean traces by a^-2 and a^2."""
    omega, numel = [[9.0, 1.0], [8.0, 2.0]], [100, 100]
    first = Problem.from_arrays(["a", "b"], (2, 8), omega, numel, mean_trace=[1.0, 2.0])
    second = Problem.from_arrays(["a", "b"], (2, 8), omega, numel, mean_trace=[4.0, 0.5])
    assert list(plan_frontier(first).omega) == list(plan_frontier(second).omega)
    assert select(first, "5bit").bits == select(second, "5bit").bits
    assert select(first, "5bit", "monotone").bits != select(second, "5bit", "monotone").bits
