"""The estimators against their own theory: unbiased, and standard errors that mean what they say."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from hawq_lightning import measure
from hawq_lightning.sensitivity import find_sites
from tests.cases import CASES, ConvNet, build


@pytest.fixture(scope="module")
def small():
    _, loss_fn = CASES["cross_entropy"]
    net = build(ConvNet)
    g = torch.Generator().manual_seed(9)
    x, y = torch.randn(24, 2, 8, 8, generator=g, dtype=torch.float64), torch.arange(24) % 3
    table = find_sites(net, lambda: loss_fn(net, (x, y)), 24)
    exact = measure(net, [(x, y)], loss_fn, sites=table, estimator="exact", progress=False)
    return net, x, y, loss_fn, table, exact


@pytest.mark.parametrize(
    ("runs", "least", "band"), [(36, 200, 0.9), pytest.param(120, 700, 0.92, marks=pytest.mark.stress)]
)
def test_intervals_cover_at_the_stopping_time(small, runs, least, band):
    net, x, y, loss_fn, table, exact = small
    hits = total = 0
    for seed in range(runs):
        found = measure(net, [(x, y)], loss_fn, sites=table, rtol=0.1, seed=seed, max_probes=200, progress=False)
        for r in found:
            if exact[r.name].trace and r.stderr > 1e-9 * r.trace:
                hits += abs(r.trace - exact[r.name].trace) <= 1.96 * r.stderr
                total += 1
    assert total > least
    # runs share nothing, sites of a run share probes: allow for that in the band
    assert band <= hits / total <= 1.9 - band


@pytest.mark.parametrize("count", [24, pytest.param(60, marks=pytest.mark.stress)])
def test_estimates_are_unbiased(small, count):
    net, x, y, loss_fn, table, exact = small
    runs = [
        measure(net, [(x, y)], loss_fn, sites=table, rtol=9.0, rotate=False, seed=s, progress=False)
        for s in range(count)
    ]
    for r in exact:
        values = torch.tensor([run[r.name].trace for run in runs], dtype=torch.float64)
        error = float(values.std()) / math.sqrt(len(runs))
        assert abs(float(values.mean()) - r.trace) <= 4 * error + 1e-9 * r.trace, r.name


def test_rotation_lowers_the_error(small):
    net, x, y, loss_fn = small[:4]

    sure = copy.deepcopy(net)  # a trained network's outputs are far from uniform
    with torch.no_grad():
        sure.fc.weight.mul_(12)
        sure.fc.bias.mul_(12)
    kwargs = {"rtol": 0.02, "max_probes": 20, "progress": False}
    plain = measure(sure, [(x, y)], loss_fn, rotate=False, **kwargs)
    turned = measure(sure, [(x, y)], loss_fn, rotate=True, **kwargs)
    better = [b.stderr < a.stderr for a, b in zip(plain, turned)]
    assert sum(better) >= 0.75 * len(better)


def test_data_error_predicts_the_spread_over_image_sets(small):
    net, _, y, loss_fn, table, _ = small
    g = torch.Generator().manual_seed(4)
    traces, errors = [], []
    for _ in range(60):
        xs = torch.randn(16, 2, 8, 8, generator=g, dtype=torch.float64)
        found = measure(net, [(xs, y[:16])], loss_fn, sites=table, estimator="exact", progress=False)
        traces.append([r.trace for r in found])
        errors.append([r.stderr_data for r in found])
    spread = torch.tensor(traces, dtype=torch.float64).std(0)
    told = torch.tensor(errors, dtype=torch.float64).square().mean(0).sqrt()
    ratio = (told / spread)[spread > 1e-12]
    assert bool(((ratio > 0.7) & (ratio < 1.4)).all()), ratio


def test_the_stopping_rule_reaches_what_it_was_asked_for(small):
    net, x, y, loss_fn, table, _ = small
    for rtol in (0.2, 0.05):
        found = measure(net, [(x, y)], loss_fn, sites=table, rtol=rtol, max_probes=2000, progress=False)
        assert all(r.stderr <= rtol * r.trace for r in found if r.trace)
    assert found.settings["probes"] > 2


def test_same_seed_same_numbers_other_seed_others(small):
    net, x, y, loss_fn, table, _ = small
    a, b, c = (measure(net, [(x, y)], loss_fn, sites=table, seed=s, progress=False) for s in (1, 1, 2))
    assert [r.trace for r in a] == [r.trace for r in b]
    assert [r.trace for r in a] != [r.trace for r in c]
    assert a.fingerprint == b.fingerprint != c.fingerprint
