"""Reentrant checkpoints: sites, traces and what `hutchinson` sees are those of the plain network."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import CheckpointFunction, checkpoint, checkpoint_sequential

from hawq_lightning import measure, sites
from hawq_lightning.sensitivity import find_sites
from tests.cases import dense_activation_traces, dense_weight_traces


class Blocks(nn.Module):
    """Residual blocks, run as they are or in one of the forms of checkpointing."""

    def __init__(self, form: str, nested: bool = False) -> None:
        super().__init__()
        self.form, self.nested = form, nested
        self.stem, self.out = nn.Linear(4, 4), nn.Linear(4, 3)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 5), nn.Softplus(), nn.Linear(5, 4)) for _ in range(2))

    def _block(self, block: nn.Module, x: torch.Tensor) -> torch.Tensor:
        if self.form == "sequential":
            return checkpoint_sequential(block, 2, x, use_reentrant=True)
        if self.form == "plain":
            return block(x)
        inner = lambda t: checkpoint(block, t, use_reentrant=True) if self.nested else block(t)  # noqa: E731
        return checkpoint(inner, x, use_reentrant=self.form == "reentrant")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = x + self._block(block, x)
        return self.out(x)


BATCH = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), torch.arange(6) % 3


def loss_fn(m: nn.Module, b: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return F.cross_entropy(m(b[0]), b[1])


def network(form: str, nested: bool = False) -> Blocks:
    torch.manual_seed(0)
    return Blocks(form, nested).double()


@pytest.mark.parametrize("form", ["reentrant", "sequential", "not reentrant", "nested"])
@pytest.mark.parametrize("estimator", ["ggn", "hutchinson", "hessian"])
def test_checkpointed_blocks_have_the_traces_of_plain_ones(form, estimator):
    settings = {"estimator": estimator, "progress": False, "max_probes": 8, "seed": 3}
    plain = network("plain")
    net = network("reentrant", nested=True) if form == "nested" else network(form)
    assert sites(net, BATCH).sites == sites(plain, BATCH).sites
    got, expected = measure(net, [BATCH], loss_fn, **settings), measure(plain, [BATCH], loss_fn, **settings)
    assert [(r.name, pytest.approx(r.trace, rel=1e-9)) for r in got] == [(r.name, r.trace) for r in expected]
    assert "apply" not in CheckpointFunction.__dict__  # training goes on as before


def test_traces_of_reentrant_blocks_are_those_of_the_dense_hessian():
    net, plain = network("reentrant"), network("plain")
    table = find_sites(net, lambda: loss_fn(net, BATCH), 6)
    truth = dense_weight_traces(plain, BATCH, loss_fn, table) | dense_activation_traces(plain, BATCH, loss_fn, table)
    got = measure(net, [BATCH], loss_fn, estimator="hutchinson", rtol=0.05, max_probes=200, progress=False)
    assert {record.name for record in got} == set(truth)
    for record in got:
        assert abs(record.trace - truth[record.name]) <= 4.5 * record.stderr + 1e-9, record


@pytest.mark.parametrize("cell", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("reentrant", [True, False])
def test_a_recurrent_layer_inside_of_a_checkpoint_is_that_of_the_plain_network(cell, reentrant):
    """Its first state is a constant, so that a product with it has no gradient."""

    class Net(nn.Module):
        def __init__(self, checkpointed: bool) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.stem, self.cell, self.out = nn.Linear(4, 4), cell(4, 4, batch_first=True), nn.Linear(4, 3)
            self.checkpointed = checkpointed

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            block = lambda t: self.cell(t)[0]  # noqa: E731
            x = self.stem(x)
            x = checkpoint(block, x, use_reentrant=reentrant) if self.checkpointed else block(x)
            return self.out(x.mean(1))

    batch = torch.randn(3, 2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), torch.arange(3)
    for estimator in ("ggn", "hessian"):
        got, expected = (
            measure(Net(c).double(), [batch], loss_fn, estimator=estimator, progress=False, max_probes=4)
            for c in (True, False)
        )
        assert [(r.name, pytest.approx(r.trace, rel=1e-9)) for r in got] == [(r.name, r.trace) for r in expected]
