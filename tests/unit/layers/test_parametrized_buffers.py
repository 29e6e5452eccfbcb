"""Parametrizations that move buffers at every look at their weight while training: no function of ours moves them."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize
from torch.nn.utils import spectral_norm as old_spectral_norm
from torch.nn.utils.parametrizations import spectral_norm

from hawq_lightning import Problem, candidates, forecast, measure, select, sites
from hawq_lightning.quantization import first_order_term, loss_per_site

GENERATOR = torch.Generator().manual_seed(0)
BATCHES = [(torch.randn(8, 6, generator=GENERATOR), torch.arange(8) % 3) for _ in range(2)]


class Counts(nn.Module):
    """A weight that shrinks with every look at it."""

    def __init__(self):
        super().__init__()
        self.register_buffer("looks", torch.zeros(()))

    def forward(self, w):
        if self.training:
            self.looks += 1
        return w / (1 + self.looks)


def counted(layer: nn.Module) -> nn.Module:
    parametrize.register_parametrization(layer, "weight", Counts())
    return layer


MAKERS = {"spectral_norm": spectral_norm, "old_spectral_norm": old_spectral_norm, "own": counted}


def loss_fn(m, b):
    return F.cross_entropy(m(b[0]), b[1])


@pytest.mark.parametrize("maker", MAKERS)
def test_every_function_leaves_buffers_bit_for_bit(maker):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), MAKERS[maker](nn.Linear(8, 8)), nn.ReLU(), nn.Linear(8, 3)).train()
    before = {n: v.clone() for n, v in net.state_dict().items()}

    def unmoved(what: str) -> None:
        moved = [n for n, v in net.state_dict().items() if not torch.equal(v, before[n])]
        assert not moved, what
        assert all(m.training for m in net.modules()), what

    table = sites(net, BATCHES[0][0])
    unmoved("sites")
    traces = measure(net, BATCHES, loss_fn, max_probes=4, progress=False)
    unmoved("measure")
    found = candidates(net, BATCHES, traces, table, loss_fn)
    unmoved("candidates")
    plan = select(Problem(table, found, traces), "8x")
    unmoved("select")
    loss_per_site(net, BATCHES, loss_fn, table, found)
    unmoved("loss_per_site")
    forecast(net, BATCHES, loss_fn, table, found)
    unmoved("forecast")
    first_order_term(net, BATCHES, loss_fn, plan)
    unmoved("first_order_term")
