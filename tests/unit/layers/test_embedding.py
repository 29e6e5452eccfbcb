"""Embeddings and bags of them as weight sites: no activation, rows that share a scale, tables tied to a projection."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from hawq_lightning import sites
from hawq_lightning.layers import LayerCall, inner_products, kind_of
from tests.layer_checks import check_quantized, check_traces

TOKENS = torch.tensor([[1, 2, 2, 0], [3, 1, 0, 0], [5, 6, 1, 2], [4, 4, 4, 3]])
TARGETS = torch.tensor([1, 0, 2, 6])


class Words(nn.Module):
    def __init__(self, tied: bool = False, **options: Any) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 3, **options)
        self.mix, self.out = nn.Linear(3, 3), nn.Linear(3, 7)
        if tied:
            self.out.weight = self.table.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.out(self.mix(self.table(tokens)).relu().mean(1))


class Bags(nn.Module):
    """Two bags of words, one by offsets."""

    def __init__(self, mode: str, padding: int | None = None) -> None:
        super().__init__()
        self.padded = nn.EmbeddingBag(7, 3, mode=mode, padding_idx=padding)
        self.ragged = nn.EmbeddingBag(7, 3, mode=mode)
        self.out = nn.Linear(3, 7)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        offsets = torch.arange(len(tokens)) * tokens.shape[1]
        return self.out(self.padded(tokens) + self.ragged(tokens.flatten(), offsets))


NETS = {
    "padded": lambda: Words(padding_idx=0),
    "plain": Words,
    "tied": lambda: Words(tied=True),
    "sum": lambda: Bags("sum"),
    "mean": lambda: Bags("mean", padding=0),
    "max": lambda: Bags("max"),
}


def _loss(model: nn.Module, batch: Any) -> torch.Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def _build(name: str) -> nn.Module:
    torch.manual_seed(0)
    return NETS[name]().eval()


@pytest.mark.parametrize("name", NETS)
def test_traces_are_the_dense_ones(name):
    net = _build(name).double()
    table = check_traces(net, (TOKENS, TARGETS), _loss, exact=() if name == "tied" else ("table", "mix", "out"))
    assert {s.name for s in table.weights} == {n for n, p in net.named_parameters() if "weight" in n}
    looked_up = [x for x in table.layers if x.activation is None]
    assert looked_up and not any(x.macs for x in looked_up) and not any(f.bytes > 28 for f in table.floats)


@pytest.mark.parametrize("name", NETS)
def test_it_is_quantized_trained_and_packed(name, tmp_path):
    net = check_quantized(lambda: _build(name), (TOKENS, TARGETS), _loss, tmp_path)
    if name == "padded":  # the row of the padding is not trained
        _loss(net.train(), (TOKENS, TARGETS)).backward()
        assert not net.table.weight.grad[0].any() and net.table.weight.grad[1].any()


@pytest.mark.parametrize("per_sample, two, tied", list(itertools.product((True, False), repeat=3)))
def test_gradient_products_agree_with_autograd(per_sample, two, tied):
    torch.manual_seed(0)
    table, linear = nn.Embedding(7, 3, padding_idx=1).double(), nn.Linear(3, 7, bias=False).double()
    linear.weight = table.weight
    x, y = torch.randint(7, (4, 5)), torch.randn(4, 2, 3).double()
    (g, h), (a, b) = torch.randn(2, 4, 5, 3).double(), torch.randn(2, 4, 2, 7).double()
    calls = [LayerCall(table, x, g, h if two else None)]
    calls += [LayerCall(linear, y, a, b if two else None)] if tied else []

    def gradient(n: int, g: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
        value = (table(x[n]) * g[n]).sum() + ((linear(y[n]) * a[n]).sum() if tied else 0.0)
        return torch.autograd.grad(value, table.weight)[0]

    first, second = (torch.stack([gradient(n, *s) for n in range(4)]) for s in ((g, a), (h, b) if two else (g, a)))
    if not per_sample:
        first, second = first.sum(0, keepdim=True), second.sum(0, keepdim=True)
    assert torch.allclose(inner_products(calls, per_sample), (first * second).flatten(1).sum(1), rtol=1e-11)


@pytest.mark.parametrize("mode, padding", list(itertools.product(["sum", "mean", "max"], [None, 1])))
def test_bags_of_every_form_are_as_torch_has_them(mode, padding):
    torch.manual_seed(0)
    for last, weighted in itertools.product((True, False), repeat=2):
        bag = nn.EmbeddingBag(7, 3, mode=mode, padding_idx=padding, include_last_offset=last).double()
        weights = [torch.randn(4, 3).double(), torch.randn(9).double()] if weighted and mode == "sum" else [None, None]
        offsets = torch.tensor([0, 3, 3, 7, *([9] if last else [])])
        for args in ((torch.randint(7, (4, 3)), None, weights[0]), (torch.randint(7, (9,)), offsets, weights[1])):
            if last and args[1] is None and torch.__version__ < torch.torch_version.TorchVersion("2.10"):
                continue  # torch 2.9 leaves the last row out
            assert torch.allclose(bag(*args), kind_of(bag).explicit_forward(bag, *args))


def test_long_rows_are_shortened_where_the_float_layer_does_it(tmp_path):
    def build() -> nn.Module:
        torch.manual_seed(0)
        return Words(max_norm=1.0).eval()

    net = check_quantized(build, (TOKENS, TARGETS), _loss, tmp_path)
    assert float(net.table.weight[1:].norm(dim=1).max()) <= 1.0001


def test_sparse_gradients_keep_a_table_float():
    torch.manual_seed(0)
    table = sites(Words(sparse=True).eval(), (TOKENS, TARGETS))
    assert [(f.name, f.reason) for f in table.floats if f.bytes > 30] == [("table", "its gradients are sparse")]


class _Shifted(nn.Embedding):
    """As OPT and BART number positions."""

    def forward(self, x):
        return super().forward(x + 1)


class _Scaled(nn.Embedding):
    """As Gemma's words."""

    def forward(self, x):
        return super().forward(x) * self.embedding_dim**0.5


class _Masked(nn.Embedding):
    """By a function of the weight."""

    def forward(self, x, mask=None):
        return F.embedding(x, self.weight, self.padding_idx)


class _Net(nn.Module):
    def __init__(self, table):
        super().__init__()
        self.table, self.head = table(12, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.table(x).mean(1))


@pytest.mark.parametrize("table", [_Shifted, _Scaled, _Masked])
def test_a_table_with_a_forward_of_its_own_is_quantized(table, tmp_path):
    def build():
        torch.manual_seed(0)
        return _Net(table).eval()

    def loss(model, batch):
        return F.cross_entropy(model(batch[0]), batch[1])

    torch.manual_seed(1)
    batch = torch.randint(0, 10, (4, 5)), torch.arange(4) % 3
    check_quantized(build, batch, loss, tmp_path)
    found = check_traces(build().double(), batch, loss, exact=("head",))
    assert {s.name for s in found} == {"table.weight", "head.weight", "head.input"}
