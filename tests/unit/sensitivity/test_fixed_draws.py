"""Draws that a network makes whatever its mode: the same in every pass, and as little dropped as can be."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import hawq_lightning as hl
from hawq_lightning.sensitivity import isolated_eval, repeatable
from tests.cases import dense_weight_traces

DRAWS = {
    "torch": lambda: float(torch.rand(())),
    "numpy": lambda: float(np.random.rand()),
    "python": random.random,
}


class LayerDrop(nn.Module):
    """Blocks are left out at random, by inline draws."""

    def __init__(self, draw, blocks=4, dropped=0.3):
        super().__init__()
        self.draw, self.dropped = DRAWS[draw], dropped
        self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(blocks))
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        for block in self.blocks:
            if self.draw() >= self.dropped:
                x = x + F.relu(block(x))
        return self.head(x)


class StochasticDepth(LayerDrop):
    """Blocks are left out sample by sample."""

    def forward(self, x):
        for block in self.blocks:
            keep = torch.tensor([[self.draw() >= self.dropped] for _ in x]).to(x)
            x = x + F.relu(block(x)) * keep / (1 - self.dropped)
        return self.head(x)


class Noisy(LayerDrop):
    """The latent of a VAE."""

    def forward(self, x):
        for block in self.blocks:
            x = F.relu(block(x)) + 0.3 * torch.randn_like(x) + self.draw()
        return self.head(x)


def loss(m, b):
    return F.cross_entropy(m(b[0]), b[1])


@pytest.mark.parametrize("draw", DRAWS)
@pytest.mark.parametrize("kind", [LayerDrop, StochasticDepth, Noisy])
def test_draws_are_the_same_in_every_pass(kind, draw):
    torch.manual_seed(0)
    model, batch = kind(draw).double(), (torch.randn(6, 4).double(), torch.arange(6) % 3)
    states = torch.get_rng_state(), random.getstate()
    traces = hl.measure(model, [batch], loss, estimator="exact", progress=False)
    assert torch.equal(states[0], torch.get_rng_state()) and states[1] == random.getstate()
    assert {r.name for r in traces if r.kind == "weight"} == {f"blocks.{i}.weight" for i in range(4)} | {"head.weight"}
    with isolated_eval(model):
        fixed = repeatable(model, loss)
        values = {float(fixed(model, batch)) for _ in range(3)}
        for parameter in model.parameters():
            parameter.requires_grad_(True)
        table = hl.SiteTable(
            tuple(
                hl.Site(r.name, "weight", (r.name.removesuffix(".weight"),), (), 0)
                for r in traces
                if r.kind == "weight"
            ),
            (),
        )
        dense = dense_weight_traces(model, batch, fixed, table)
    assert len(values) == 1
    assert all(traces[n].trace == pytest.approx(v, rel=1e-6) for n, v in dense.items())


def test_a_network_without_draws_is_run_as_often():
    calls = []

    def counted(m, b):
        calls.append(1)
        return loss(m, b)

    model, batches = nn.Linear(4, 3), [(torch.randn(6, 4), torch.arange(6) % 3) for _ in range(3)]
    with isolated_eval(model):
        fixed = repeatable(model, counted)
        for batch in batches:
            fixed(model, batch)
    assert len(calls) == len(batches)


@pytest.mark.parametrize("draw", DRAWS)
def test_blocks_that_a_batch_drops_count_in_others(draw):
    torch.manual_seed(0)
    model = LayerDrop(draw, blocks=12, dropped=0.5)
    batches = [(torch.randn(6, 4), torch.arange(6) % 3) for _ in range(5)]
    traces = hl.measure(model, batches, loss, progress=False, rtol=0.5)
    assert sum(r.kind == "weight" for r in traces) == 13
