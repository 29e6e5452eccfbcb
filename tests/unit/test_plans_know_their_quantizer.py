"""Functions alone: the quantizer whose errors were weighed is the one that is installed, whatever it is."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import hawq_lightning as hl
from hawq_lightning import QuantizerConfig
from hawq_lightning.quantization import loss_of_plan, loss_per_site, quantized_layers, quantizer_names
from hawq_lightning.selection import problem_of, with_bootstrap_stability

OPTIONS = {"uniform": {"ranges": "percentile"}}
BATCH = torch.randn(16, 6, generator=torch.Generator().manual_seed(0)), torch.arange(16) % 3


def loss(net, batch):
    return F.cross_entropy(net(batch[0]), batch[1])


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)).eval()


def weighed(name):
    net = network()
    table = hl.sites(net, BATCH)
    traces = hl.measure(net, [BATCH], loss, sites=table, progress=False, rtol=0.5)
    config = QuantizerConfig(name, options=OPTIONS.get(name, {}), weight_bits=(2, 3, 4, 8))
    return net, table, hl.candidates(net, [BATCH], traces, table, loss, config=config), traces


@pytest.mark.parametrize("name", quantizer_names())
def test_the_quantizer_that_was_weighed_is_installed(name, tmp_path):
    net, table, found, traces = weighed(name)
    found.save(tmp_path / "candidates.json")
    for choices in (found, hl.Candidates.load(tmp_path / "candidates.json")):
        plan = hl.select(hl.Problem(table, choices, traces), "7x")
        assert (plan.quantizer, dict(plan.quantizer_options)) == (name, OPTIONS.get(name, {}))
        plan.save(tmp_path / "plan.json")
        for each in (plan, hl.Plan.load(tmp_path / "plan.json")):
            made = hl.quantize(copy.deepcopy(net), each)
            assert {x.weight_quantizer.name for x in quantized_layers(made).values()} == {name}
            assert all(x.module.quantizer_options == OPTIONS.get(name, {}) for x in quantized_layers(made).values())


@pytest.mark.parametrize("selector", ["pareto", "monotone", "uniform", "direct", "random"])
def test_every_selector_hands_it_on(selector):
    _, table, found, traces = weighed("lsq")
    problem = hl.Problem(table, found, traces)
    plan = hl.select(problem, "5x", selector)
    assert plan.quantizer == "lsq"
    assert hl.select(problem_of(plan), "6x").quantizer == "lsq"
    assert hl.selection.recost(plan.replace(sites=plan.sites)).quantizer == "lsq"
    assert hl.select(problem.redrawn({"0.weight": 2.0}), "5x", selector).quantizer == "lsq"
    if selector in ("pareto", "monotone"):
        assert with_bootstrap_stability(problem, plan, bootstraps=4).quantizer == "lsq"


def test_somebody_says_otherwise():
    net, table, found, traces = weighed("lsq")
    assert hl.select(hl.Problem(table, dict(found), traces), "7x").quantizer == "uniform"
    plan = hl.select(hl.Problem(table, found, traces), "7x").replace(quantizer="uniform", quantizer_options={})
    made = hl.quantize(copy.deepcopy(net), plan)
    assert {x.weight_quantizer.name for x in quantized_layers(made).values()} == {"uniform"}


@pytest.mark.parametrize("name", ["fqn", "dorefa", "lsq"])
def test_losses_of_plans_are_those_of_the_quantizer(name):
    net, table, found, traces = weighed(name)
    plans = [hl.select(hl.Problem(table, found, traces), budget) for budget in ("7x", "11x")]
    with loss_of_plan(net, [BATCH], loss) as of:
        measured = [of(plan) for plan in plans]
    with loss_of_plan(net, [BATCH], loss, quantizer=name) as of:
        assert measured == [of(plan) for plan in plans]
    for plan, value in zip(plans, measured, strict=True):
        made = hl.quantize(copy.deepcopy(net), plan)
        assert value == pytest.approx(float(loss(made, BATCH).detach()), rel=1e-6)
    assert not quantized_layers(net)
    assert loss_per_site(net, [BATCH], loss, table, found) == loss_per_site(
        net, [BATCH], loss, table, dict(found), quantizer=name
    )
