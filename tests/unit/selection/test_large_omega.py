"""Ω of any size gives the plan that Ω of another unit gives, or is refused in one sentence."""

import numpy as np
import pytest

from hawq_lightning import HawqError
from hawq_lightning.selection import LatencyTable, Problem, frontier, select

BUDGETS = ["8x", {"weights": "8x", "file_bytes": "100KiB"}]


def problem(omega):
    count = len(omega)
    return Problem.from_arrays(
        [f"s{i}" for i in range(count)], (2, 4, 8), omega, [1000 * (i + 1) for i in range(count)]
    )


@pytest.mark.parametrize("unit", [2.0**k for k in (-900, -300, 300, 530, 960)])
@pytest.mark.parametrize("budget", BUDGETS)
def test_the_unit_of_omega_does_not_decide(unit, budget):
    for seed in range(3):
        omega = -np.sort(-np.random.default_rng(seed).random((6, 3)), 1)
        plan, same = select(problem(omega), budget), select(problem(omega * unit), budget)
        assert same.bits == plan.bits and same.omega == plan.omega * unit


def test_a_frontier_of_large_omega_is_that_of_small_omega():
    omega = -np.sort(-np.random.default_rng(0).random((5, 3)), 1)
    cost = np.outer(np.arange(1, 6), (2, 4, 8))
    small, large = frontier(omega, cost), frontier(omega * 2.0**600, cost)
    assert (large.omega == small.omega * 2.0**600).all() and (large.cost == small.cost).all()


@pytest.mark.parametrize("value", [1e300, 1.7e308])
def test_omega_that_cannot_be_added_up_is_refused_by_name(value):
    with pytest.raises(HawqError, match="'s0' at 2 bits is .*cannot be added up"):
        select(problem([[value, 1.0, 0.5]]), "8x")
    with pytest.raises(HawqError, match="site 0, option 0 is .*cannot be added up"):
        frontier([[value, 1.0]], [[1, 2]])


@pytest.mark.parametrize("bits", [(2.7, 4.2), ("2", 4), (None, 4), (True, 4), (float("nan"), 4), ((2.5, 4), (2, 4))])
def test_bits_that_are_no_whole_number_are_refused(bits):
    with pytest.raises(HawqError, match="a width in bits is .*not a whole number"):
        Problem.from_arrays(["a", "b"], bits, [[2, 1], [2, 1]], [10, 10])


@pytest.mark.parametrize("bits", [(2.0, 4), np.array([2, 4]), np.array([[2, 4], [2, 4]]), [[2, 4], [2, 4]]])
def test_whole_bits_of_any_type_are_taken(bits):
    made = Problem.from_arrays(["a", "b"], bits, [[2, 1], [2, 1]], [10, 10])
    assert [g.bits for g in made.groups] == [(2, 4), (2, 4)]


def test_elements_and_latencies_are_whole_numbers_too():
    with pytest.raises(HawqError, match="numel of 'a' is 2.5"):
        Problem.from_arrays(["a"], (2, 4), [[2, 1]], [2.5])
    with pytest.raises(HawqError, match="bits are 2.7, not a whole number"):
        LatencyTable([{"layer": "a", "bits": 2.7, "ms": 1}])


def test_a_clock_that_goes_back_gives_no_negative_seconds(monkeypatch):
    clock = iter(range(10_000, 0, -500))
    monkeypatch.setattr("time.perf_counter", lambda: float(next(clock)))
    assert select(problem([[2.0, 1.0, 0.5]]), "8x").settings["selection_seconds"] == 0
