"""Traces of random networks with random losses are those of their estimator's own dense matrix."""

from __future__ import annotations

import pytest

from tests.oracle.generated import ESTIMATORS, make_case, run, run_case

SEEDS = 40
QUICK = 16  # in every test run


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("seed", [s if s < QUICK else pytest.param(s, marks=pytest.mark.stress) for s in range(SEEDS)])
def test_a_random_network_is_measured_right(seed):
    """One estimator a seed; the campaign takes all of them."""
    wrong = run_case(seed, [ESTIMATORS[seed % len(ESTIMATORS)]])
    assert not wrong, f"{make_case(seed).about}: {wrong}"


@pytest.mark.stress
@pytest.mark.filterwarnings("ignore")
def test_a_campaign_of_random_networks_is_measured_right():
    result = run(500, 10_000)
    assert not result["failed"], result["misses"]
