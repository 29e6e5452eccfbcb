"""Networks in which no layer reads an activation by itself: a forward computes with every weight, or looks it up."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.func import functional_call, hessian, jacrev
from torch.nn import functional as F

from hawq_lightning import measure

GENERATOR = torch.Generator().manual_seed(3)
X = torch.randn(6, 6, dtype=torch.float64, generator=GENERATOR)
INDICES = torch.randint(0, 6, (6, 2), generator=GENERATOR)
LABELS = torch.arange(6) % 3


class Scaled(nn.Linear):
    """Equalised learning rate, as in StyleGAN."""

    def forward(self, x):
        return F.linear(x, self.weight * self.in_features**-0.5, self.bias)


class Masked(nn.Linear):
    """MADE's masks."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.register_buffer("mask", (torch.arange(self.weight.numel()) % 3 > 0).reshape(self.weight.shape).double())

    def forward(self, x):
        return F.linear(x, self.weight * self.mask, self.bias)


class Noisy(nn.Linear):
    """NoisyNet's layer: without noise in evaluation."""

    def forward(self, x):
        noise = torch.randn_like(self.weight) if self.training else 0
        return F.linear(x, self.weight + 0.1 * noise, self.bias)


class Standardised(nn.Conv2d):
    """A convolution of weights of mean 0 and deviation 1."""

    def forward(self, x):
        centred = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, centred / (self.weight.std((1, 2, 3), keepdim=True) + 1e-5), self.bias)


class Factors(nn.Module):
    """Factors of a matrix, looked up."""

    def __init__(self):
        super().__init__()
        self.rows, self.columns = nn.Embedding(6, 3), nn.Embedding(6, 3)

    def forward(self, x):
        return self.rows(x[:, 0]) * self.columns(x[:, 1])


def two(layer):
    return nn.Sequential(layer(6, 8), nn.ReLU(), layer(8, 3))


NETWORKS = {
    "equalised": (lambda: two(Scaled), X),
    "masked": (lambda: two(Masked), X),
    "noisy": (lambda: two(Noisy), X),
    "standardised": (
        lambda: nn.Sequential(nn.Unflatten(1, (6, 1, 1)), two(lambda i, o: Standardised(i, o, 1)), nn.Flatten()),
        X,
    ),
    "one_layer": (lambda: Scaled(6, 3), X),
    "look_ups": (Factors, INDICES),
}


def loss_fn(m, b):
    return F.cross_entropy(m(b[0]), b[1])


def dense_traces(net: nn.Module, x: torch.Tensor) -> tuple[dict[str, float], dict[str, float]]:
    """Traces of the Hessian and of the Gauss-Newton matrix by each weight."""
    true, gauss_newton = {}, {}
    for name, w in net.named_parameters():
        if not name.endswith("weight"):
            continue
        w = w.detach()

        def outputs(value, name=name):
            return functional_call(net, {name: value}, (x,))

        def loss(y):
            return F.cross_entropy(y, LABELS)

        true[name] = float(hessian(lambda v, f=outputs: loss(f(v)))(w).reshape(w.numel(), -1).trace())
        j = jacrev(outputs)(w).reshape(-1, w.numel())
        h = hessian(loss)(outputs(w)).reshape(len(j), len(j))
        gauss_newton[name] = float((j.T @ h @ j).trace())
    return true, gauss_newton


@pytest.mark.parametrize("estimator", ["auto", "ggn", "exact", "hessian", "hutchinson"])
@pytest.mark.parametrize("name", NETWORKS)
def test_traces_are_those_of_the_dense_matrices(name, estimator):
    torch.manual_seed(0)
    make, x = NETWORKS[name]
    net = make().double().eval()
    true, gauss_newton = dense_traces(net, x)
    right = true if estimator in ("hessian", "hutchinson") else gauss_newton
    measured = measure(net, [(x, LABELS)], loss_fn, estimator=estimator, rtol=0.02, max_probes=100, progress=False)
    assert {r.name for r in measured} == set(right)
    for r in measured:
        assert abs(r.trace - right[r.name]) <= 4 * r.stderr + 1e-8, r.name
