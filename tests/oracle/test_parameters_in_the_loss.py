"""Losses that differentiate by parameters themselves, or ask which parameters are trained: as in training."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from hawq_lightning import candidates, measure, sites

BATCH = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(3)), torch.arange(6) % 3


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def cross_entropy(m, b):
    return F.cross_entropy(m(b[0]), b[1])


def adaptive_weight(m, b):
    """VQGAN: two losses are balanced by their gradients in the last layer."""
    z = m(b[0])
    one, other = F.cross_entropy(z, b[1]), z.square().mean()
    a, c = (torch.autograd.grad(x, m[2].weight, retain_graph=True)[0].norm() for x in (one, other))
    return one + (a / c).detach() * other


def by_a_bias(m, b):
    loss = cross_entropy(m, b)
    return loss * (1 + torch.autograd.grad(loss, m[0].bias, retain_graph=True)[0].norm().detach())


def by_what_is_made_of_one(m, b):
    """What is differentiated by is no parameter itself."""
    shift = m[0].bias * 1
    loss = F.cross_entropy(m[2](m[1](m[0](b[0]) + shift)), b[1])
    return loss * (1 + torch.autograd.grad(loss, shift, retain_graph=True)[0].norm().detach())


def gradient_penalty(m, b):
    loss = cross_entropy(m, b)
    gradients = torch.autograd.grad(loss, list(m.parameters()), create_graph=True)
    return loss + 0.1 * sum(g.square().sum() for g in gradients)


def trained_weights_decay(m, b):
    return cross_entropy(m, b) + 0.1 * torch.stack([p.square().sum() for p in m.parameters() if p.requires_grad]).sum()


def filtered(m, b):
    return cross_entropy(m, b) + 0.1 * sum(p.square().sum() for p in filter(lambda p: p.requires_grad, m.parameters()))


def branch(m, b):
    z = m(b[0])
    return F.cross_entropy(z, b[1]) if m[0].weight.requires_grad else z.detach().sum()


DIFFERENTIATE = [adaptive_weight, by_a_bias, by_what_is_made_of_one, gradient_penalty]
ASK = [trained_weights_decay, filtered, branch]


def dense_trace(net: nn.Module, loss_fn, name: str) -> float:
    w = net.get_parameter(name)
    (slope,) = torch.autograd.grad(loss_fn(net, BATCH), w, create_graph=True)
    rows = [torch.autograd.grad(g, w, retain_graph=True)[0].reshape(-1) for g in slope.reshape(-1)]
    return float(torch.stack(rows).diagonal().sum())


@pytest.mark.parametrize("loss_fn", [*DIFFERENTIATE, *ASK])
def test_traces_are_those_of_the_dense_hessian(loss_fn):
    net = network()
    right = {n: dense_trace(net, loss_fn, n) for n in ("0.weight", "2.weight")}
    measured = measure(net, [BATCH], loss_fn, estimator="hutchinson", rtol=0.03, max_probes=400, progress=False)
    for name, trace in right.items():
        r = measured[name]
        assert abs(r.trace - trace) <= 4 * r.stderr + 1e-9, name


@pytest.mark.parametrize("loss_fn", [*DIFFERENTIATE, *ASK])
@pytest.mark.parametrize("given", [False, True])
def test_every_function_runs_such_a_loss_and_leaves_flags_and_gradients(loss_fn, given):
    net = network()
    net[0].bias.requires_grad_(loss_fn is not adaptive_weight)  # a frozen one stays frozen
    before = [p.requires_grad for p in net.parameters()]
    table = sites(net, BATCH[0])
    measured = measure(net, [BATCH], loss_fn, sites=table if given else None, max_probes=4, progress=False)
    assert len(candidates(net, [BATCH], measured, table, loss_fn))
    assert [p.requires_grad for p in net.parameters()] == before
    assert all(p.grad is None for p in net.parameters())


def test_what_is_asked_of_a_parameter_that_is_frozen_is_false():
    net, answers = network(), []
    net[0].weight.requires_grad_(False)

    def loss_fn(m, b):
        answers.append([p.requires_grad for p in m.parameters()])
        return cross_entropy(m, b)

    measure(net, [BATCH], loss_fn, max_probes=4, progress=False)
    assert answers and all(a == [False, True, True, True] for a in answers)


def test_other_losses_form_no_gradients_of_weights():
    net, formed = network(), []

    def loss_fn(m, b):
        formed.append((m[2].bias * 1).requires_grad)
        return cross_entropy(m, b)

    measure(net, [BATCH], loss_fn, max_probes=4, progress=False)
    assert formed and not any(formed)
