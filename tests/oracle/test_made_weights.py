"""Layers whose weight a hook makes before every call: traces are by the weight that the forward pass uses."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune, spectral_norm, weight_norm

from hawq_lightning import measure
from hawq_lightning.sensitivity import find_sites

BATCH = torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(3)), torch.arange(5) % 3
MAKERS = {
    "weight_norm": weight_norm,
    "spectral_norm": spectral_norm,
    "pruned": lambda layer: prune.l1_unstructured(layer, "weight", 5),
    "own": lambda layer: Halved.apply(layer),
}


class Halved:
    """A hook of the user's own: the weight is half of a parameter."""

    @staticmethod
    def apply(layer: nn.Module) -> nn.Module:
        w = layer.weight
        del layer._parameters["weight"]
        layer.register_parameter("twice", nn.Parameter(2 * w.detach()))
        layer.weight = w.detach()

        def make(module: nn.Module, args: object) -> None:
            module.weight = module.twice / 2

        layer.register_forward_pre_hook(make)
        return layer


class Twice(nn.Module):
    """One made weight, called in series, between smooth functions; and one that is called once."""

    def __init__(self, make):
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.once, self.out = make(nn.Linear(4, 4)), make(nn.Linear(4, 4)), nn.Linear(4, 3)

    def forward(self, x):
        x = torch.tanh(self.inner(torch.tanh(self.inner(x))))
        return self.out(x * torch.sigmoid(self.once(x)))


def loss_fn(m, b):
    return F.cross_entropy(m(b[0]), b[1])


def dense(net: nn.Module, layer: str) -> float:
    """Trace of the Hessian by the weight that the layer's calls use, put there by a hook behind the maker's."""
    module = net.get_submodule(layer)
    net(BATCH[0])
    leaf = module.weight.detach().clone().requires_grad_()

    def put(m: nn.Module, args: object) -> None:
        m.weight = leaf

    handle = module.register_forward_pre_hook(put)
    (slope,) = torch.autograd.grad(loss_fn(net, BATCH), leaf, create_graph=True)
    handle.remove()
    rows = [torch.autograd.grad(g, leaf, retain_graph=True)[0].reshape(-1) for g in slope.reshape(-1)]
    return float(torch.stack(rows).diagonal().sum())


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning")
@pytest.mark.parametrize("maker", MAKERS)
def test_true_traces_are_by_the_effective_weight(maker):
    net = Twice(MAKERS[maker]).double().eval()
    right = {f"{n}.weight": dense(net, n) for n in ("inner", "once")}
    state = {n: v.clone() for n, v in net.state_dict().items()}
    net.train()
    table = find_sites(net.eval(), lambda: loss_fn(net, BATCH), 5)
    net.train()  # spectral norm would iterate at every call
    for estimator in ("hutchinson", "hessian"):
        measured = measure(
            net, [BATCH], loss_fn, sites=table, estimator=estimator, rtol=0.02, max_probes=60, progress=False
        )
        for name, trace in right.items():
            r = measured[name]
            assert abs(r.trace - trace) <= 4 * r.stderr + 1e-6, (estimator, name)
    assert all(torch.equal(v, state[n]) for n, v in net.state_dict().items())


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning")
def test_a_network_that_was_trained_before_is_measured():
    net = Twice(weight_norm).double()
    loss_fn(net, BATCH).backward()  # the weight is now no leaf
    table = find_sites(Twice(weight_norm).double(), None)
    assert len(measure(net, [BATCH], loss_fn, sites=table, progress=False, rtol=0.5, estimator="hutchinson").records)
