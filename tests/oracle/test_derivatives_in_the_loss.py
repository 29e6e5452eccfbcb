"""Losses that differentiate the network: the true Hessian, by double backward through all of it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hawq_lightning import HawqError, measure
from hawq_lightning.sensitivity import find_sites
from tests.cases import dense_weight_traces


def _slope(m, x):
    u = m(x)
    return u, torch.autograd.grad(u.sum(), x, create_graph=True)[0]


def differential_equation(m, b):
    u, du = _slope(m, b[0].clone().requires_grad_(True))
    return (du.sum(1, keepdim=True) + u).square().mean()


def gradient_penalty(m, b):
    u, du = _slope(m, b[0].clone().requires_grad_(True))
    return u.mean() + (du.norm(dim=1) - 1).square().mean()


def forces(m, b):
    u, du = _slope(m, b[0].clone().requires_grad_(True))
    return (u - b[0].sum(1, keepdim=True)).square().mean() + 10 * (du + b[0]).square().mean()


def by_backward(m, b):
    x = b[0].clone().requires_grad_(True)
    m(x).sum().backward(create_graph=True)
    return (x.grad - 1).square().mean() + m(b[0]).square().mean()


LOSSES = [differential_equation, gradient_penalty, forces, by_backward]


def _made(loss):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 4), nn.Softplus(), nn.Linear(4, 1)).double().eval()
    batch = (torch.rand(6, 2, dtype=torch.float64),)
    return net, batch, find_sites(net, lambda: loss(net, batch), 6)


@pytest.mark.filterwarnings("ignore:Using backward")  # torch's own, of create_graph=True
@pytest.mark.parametrize("loss", LOSSES)
def test_auto_measures_the_dense_hessian(loss):
    net, batch, table = _made(loss)
    truth = dense_weight_traces(net, batch, loss, table)
    traces = measure(net, [batch], loss, sites=table, rtol=0.05, max_probes=48, progress=False)
    assert traces.settings["estimator"] == "hutchinson"
    assert any("takes derivatives of the network" in n for n in traces.notes)
    assert not any("penalty on weights" in n for n in traces.notes)
    for name, value in truth.items():
        assert abs(traces[name].trace - value) <= 4.5 * traces[name].stderr, (name, traces[name], value)


@pytest.mark.filterwarnings("ignore:Using backward")
@pytest.mark.parametrize("estimator", ["ggn", "exact", "hessian"])
@pytest.mark.parametrize("loss", [differential_equation, by_backward])
def test_estimators_that_would_miss_it_say_so(loss, estimator):
    net, batch, table = _made(loss)
    with pytest.raises(HawqError, match=f"derivatives of the network, whose curvature estimator='{estimator}'"):
        measure(net, [batch], loss, sites=table, estimator=estimator, progress=False)


def test_gradients_that_leave_no_graph_are_no_derivatives_in_the_loss():
    def adversarial(m, b):
        x = b[0].clone().requires_grad_(True)
        (slope,) = torch.autograd.grad(m(x).square().mean(), x)
        return m(b[0] + 0.1 * slope.sign()).square().mean()

    net, batch, table = _made(adversarial)
    traces = measure(net, [batch], adversarial, sites=table, max_probes=8, progress=False)
    assert traces.settings["estimator"] == "ggn"
