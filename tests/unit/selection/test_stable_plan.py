"""Measuring stops when the plan no longer changes, and the plan is as good as with exact traces."""

from __future__ import annotations

import pytest

from hawq_lightning import HAWQ, HawqError, MeasureConfig, Plan, SelectConfig, measure, select
from hawq_lightning.quantization import candidates
from hawq_lightning.selection import Problem, StablePlan
from hawq_lightning.sensitivity import find_sites
from tests.cases import CASES
from tests.trainers import Classifier, fit, loader
from tests.unit.sensitivity.test_importance_sampling import images, sure_net


@pytest.fixture(scope="module")
def case():
    _, loss_fn = CASES["cross_entropy"]
    net = sure_net()
    x, y = images(48)
    batches = [(x[i : i + 16], y[i : i + 16]) for i in (0, 16, 32)]
    table = find_sites(net, lambda: loss_fn(net, batches[0]), 16)

    def weigh(found):
        return candidates(net, batches, found, table, loss_fn, weight_bits=range(2, 9), activation_bits=(4, 8))

    return net, batches, loss_fn, table, weigh


def test_measuring_stops_with_the_plan_and_the_plan_is_good(case):
    net, batches, loss_fn, table, weigh = case
    settled = StablePlan(table, weigh, "8x", regret=0.1)
    keywords = {"sites": table, "progress": False, "rtol": 0.01, "max_probes": 2000}
    short = measure(net, batches, loss_fn, stop=settled, **keywords)
    whole = measure(net, batches, loss_fn, **keywords)
    assert short.settings["stopped"] == "enough" and whole.settings["stopped"] == "error"
    assert short.settings["probes"] < whole.settings["probes"]
    assert short.fingerprint != whole.fingerprint
    exact = measure(net, batches, loss_fn, sites=table, estimator="exact", progress=False)
    problem = Problem(table, weigh(exact), exact)
    best = select(problem, "8x")
    mine = select(Problem(table, weigh(short), short), "8x")
    lost = problem.omega_of(problem.choice_of(mine.bits)) / problem.omega_of(problem.choice_of(best.bits)) - 1
    assert 0 <= lost <= 0.2


def test_a_plan_that_noise_would_change_is_not_settled(case):
    net, batches, loss_fn, table, weigh = case
    asked = []

    def enough(found):
        asked.append(StablePlan(table, weigh, "8x", regret=0.0, bootstraps=60)(found))
        return asked[-1]

    measure(net, batches, loss_fn, sites=table, progress=False, rtol=0.2, max_probes=40, stop=enough)
    assert asked and not asked[0]


def test_the_key_is_that_of_the_question(case):
    from hawq_lightning.selection import LatencyTable

    *_, table, weigh = case
    rows = [{"layer": "a", "bits": 4, "ms": 1.0}]
    key = StablePlan(table, weigh, "8x", constraints={"latency": LatencyTable(rows)}, question="(2, 4) uniform").key
    again = StablePlan(table, weigh, "8x", constraints={"latency": LatencyTable(rows)}, question="(2, 4) uniform").key
    assert key == again
    for other in (
        {"constraints": {"latency": LatencyTable([rows[0] | {"ms": 2.0}])}, "question": "(2, 4) uniform"},
        {"constraints": {"latency": LatencyTable(rows)}, "question": "(2, 8) lsq"},
    ):
        assert StablePlan(table, weigh, "8x", **other).key != key
    a, b = (HAWQ(bits, quantizer=q).measure_callback._question for bits, q in (((2, 4), "uniform"), ((2, 4), "lsq")))
    assert a != b


def test_the_callback_stops_with_the_plan(tmp_path):
    model = Classifier()
    fit(tmp_path, model, loader(), rtol=0.001, max_probes=400, images=64, stop_when="stable_plan", dirpath=tmp_path)
    plan = Plan.load(tmp_path / "plan.json")
    assert plan.settings["stopped"] == "enough" and plan.settings["probes"] < 400
    with pytest.raises(HawqError, match=r"Unknown stop_when 'stable_pan'.*stable_plan"):
        MeasureConfig(stop_when="stable_pan")
    with pytest.raises(HawqError, match="not by 'uniform'"):
        HAWQ(measure=MeasureConfig(stop_when="stable_plan"), select=SelectConfig(selector="uniform"))
