"""The paper's figures of a network: what is drawn is what was measured."""

from __future__ import annotations

import csv
import math

import pytest
import torch

from hawq_lightning import HawqError, measure
from hawq_lightning.report import chosen_sites, draw_eigenvalues, draw_images, draw_steps, paper_figures
from hawq_lightning.sensitivity import find_sites, landscape, trace_history
from tests.cases import CASES, ConvNet, build

NAMES = ["convergence_images", "convergence_steps_weights", "convergence_steps_activations", "eigenvalues", "landscape"]


@pytest.fixture(scope="module")
def small():
    _, loss_fn = CASES["cross_entropy"]
    net = build(ConvNet)
    x, y = torch.randn(12, 2, 8, 8, dtype=torch.float64), torch.arange(12) % 3
    batches = [(x[:6], y[:6]), (x[6:], y[6:])]
    table = find_sites(net, lambda: loss_fn(net, batches[0]), 6)
    return net, batches, loss_fn, table, measure(net, batches, loss_fn, sites=table, progress=False)


@pytest.mark.parametrize("estimator", ["hutchinson", "ggn"])
def test_steps_average_to_the_trace(small, estimator):
    net, batches, loss_fn, table, _ = small
    exact = measure(net, batches, loss_fn, sites=table, estimator="exact", progress=False)
    steps = trace_history(net, batches, loss_fn, steps=61, estimator=estimator, sites=table)
    assert set(steps) == {s.name for s in table}
    for r in exact:
        values = torch.tensor(steps[r.name], dtype=torch.float64)
        assert len(values) == 61
        error = float(values.std()) / math.sqrt(61)
        assert abs(float(values.mean()) - r.trace) <= 4.5 * error + 1e-9 * r.trace


def test_running_means_end_at_the_trace(small):
    *_, found = small
    drawing = draw_images(found)
    last = {row[0]: row for row in drawing.rows}
    for site in chosen_sites(found, "weight"):
        assert last[site][1] == 12
        assert last[site][2] == pytest.approx(found[site].trace, rel=1e-4)


def test_a_landscape_is_the_loss_and_the_weight_comes_back(small):
    net, batches, loss_fn, *_ = small
    before = net.fc.weight.detach().clone()
    first, second = torch.zeros_like(before), torch.zeros_like(before)
    first[0, 0], second[1, 1] = 1.0, 1.0
    grid = landscape(net, batches, loss_fn, net.fc.weight, (first, second), [-0.5, 0.0, 0.5])
    assert torch.equal(net.fc.weight, before)
    with torch.no_grad():
        assert grid[1][1] == pytest.approx(float(sum(loss_fn(net, b) for b in batches)) / 2, rel=1e-12)
        net.fc.weight[0, 0] += 0.5
        net.fc.weight[1, 1] -= 0.5
        assert grid[2][0] == pytest.approx(float(sum(loss_fn(net, b) for b in batches)) / 2, rel=1e-12)
        net.fc.weight.copy_(before)


def test_all_figures_are_written(small, tmp_path):
    net, batches, loss_fn, table, found = small
    names = paper_figures(tmp_path, net, batches, loss_fn, found, table, steps=6, points=5)
    assert names == NAMES
    for name in names:
        assert (tmp_path / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
        with open(tmp_path / f"{name}.csv", newline="") as file:
            assert len(list(csv.reader(file))) > 2
    with open(tmp_path / "landscape.csv", newline="") as file:
        assert len(list(csv.DictReader(file))) == 2 * 25


def test_nothing_to_draw_is_no_figure(small):
    *_, found = small
    assert draw_eigenvalues(found, {}) is None
    assert draw_steps({"a": [0.0, 0.0, 0.0]}) is None
    with pytest.raises(HawqError, match="at least 2"):
        trace_history(small[0], small[1], small[2], steps=1)
    with pytest.raises(HawqError, match="hutchinson"):
        trace_history(small[0], small[1], small[2], estimator="exact")
