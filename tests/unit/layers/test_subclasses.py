"""Layers by another name: subclasses that change nothing, classes of libraries, and what only looks like one."""

from __future__ import annotations

import copy
import pickle
import sys
import types
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from hawq_lightning import quantize, sites
from hawq_lightning.layers import LinearKind, QOtherLinear, find_kind, kind_of, register_layer
from tests.layer_checks import check_quantized, check_traces, plan_for


class Linear(nn.Linear):
    """Another name."""


class Named(nn.Linear):
    """Another way to make it, and to begin."""

    def __init__(self, size: int) -> None:
        super().__init__(size, size)
        self.size = size

    def reset_parameters(self) -> None:
        nn.init.orthogonal_(self.weight)
        nn.init.zeros_(self.bias)

    def extra_repr(self) -> str:
        return f"size={self.size}"


class Up(nn.ConvTranspose2d):
    """A transposed convolution, whose channels are on another axis."""


class Tokens(nn.Embedding):
    """Another name."""


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.first, self.mix = Tokens(7, 4), Linear(4, 6), Named(6)
        self.up, self.head = Up(1, 2, 2, 2), nn.Linear(96, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.mix(self.first(self.tokens(x)).relu())
        return self.head(self.up(x[:, None, :2]).flatten(1).relu())


class Masked(nn.Linear):
    @property
    def weight(self) -> torch.Tensor:
        return self.full.tril()

    @weight.setter
    def weight(self, value: torch.Tensor) -> None:
        self.full = value


class Called(nn.Linear):
    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return super().__call__(x) + 1


def _loss(model: nn.Module, batch: Any) -> torch.Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def _build() -> nn.Module:
    torch.manual_seed(0)
    return Plain().eval()


BATCH = (torch.tensor([[6, 4, 0], [3, 1, 3], [0, 3, 3], [5, 3, 5]]), torch.tensor([0, 1, 2, 1]))


def test_subclasses_that_change_nothing_are_found_and_measured():
    table = check_traces(_build().double(), BATCH, _loss, exact=("head",))
    assert {s.name for s in table.weights} == {f"{n}.weight" for n in ("tokens", "first", "mix", "up", "head")}
    assert {x.name: x.type for x in table.layers} == {
        "tokens": "Embedding", "first": "Linear", "mix": "Linear", "up": "ConvTranspose2d", "head": "Linear",
    }  # fmt: skip
    assert not table.floats


def test_they_are_quantized_trained_and_packed_and_stay_themselves(tmp_path):
    net = check_quantized(_build, BATCH, _loss, tmp_path)
    assert isinstance(net.first, Linear) and isinstance(net.mix, Named) and net.mix.size == 6
    assert "size=6" in repr(net.mix) and net.up.weight_quantizer.scale.shape == (2,)
    assert type(pickle.loads(pickle.dumps(net.mix))) is type(net.mix) is type(copy.deepcopy(net).mix)


@pytest.mark.parametrize("layer, reason", [
    (Masked(4, 4), "a subclass of Linear with a weight of its own"),
    (Called(4, 4), "a subclass of Linear with a __call__ of its own"),
    (parametrizations.weight_norm(nn.GRUCell(4, 4), "weight_ih"), "its weight is parametrized"),
    (nn.Embedding(4, 4, sparse=True), "its gradients are sparse"),
])  # fmt: skip
def test_those_that_compute_something_else_stay_float_with_the_reason(layer, reason):
    assert find_kind(layer) is None
    net = nn.ModuleDict({"layer": layer, "head": nn.Linear(4, 3)})
    floats = {f.name: f.reason for f in sites(net).floats}
    assert floats["layer"] == reason


def _library(name: str, base: type[nn.Module]) -> None:
    """A module as of a library, in which a class has its home."""
    module = types.ModuleType(name)
    base.__module__ = name
    setattr(module, base.__qualname__, base)
    sys.modules[name] = module


def test_a_class_of_a_library_is_known_by_name():
    class Dense(nn.Module):
        def __init__(self, features: int, outputs: int) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(outputs, features))
            self.bias = nn.Parameter(torch.zeros(outputs))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.linear(x, self.weight, self.bias)

    Dense.__qualname__ = "Dense"
    assert find_kind(Dense(2, 2)) is None

    @register_layer("dense_of_a_test")
    class DenseKind(LinearKind):
        float_name, fake_quant_type, input_name = "library_of_a_test.Dense", QOtherLinear, "x"

    _library("library_of_a_test", Dense)
    try:
        torch.manual_seed(0)
        net, batch = nn.Sequential(Dense(4, 5), nn.ReLU(), Dense(5, 3)), (torch.randn(4, 4), BATCH[1])
        assert isinstance(kind_of(net[0]), DenseKind)
        check_traces(copy.deepcopy(net).double().eval(), (batch[0].double(), batch[1]), _loss, exact=("0", "2"))
        quantize(net, plan_for(net.eval(), batch, _loss))
        assert net[0].weight_quantizer.bits and torch.equal(pickle.loads(pickle.dumps(net))(batch[0]), net(batch[0]))
    finally:
        del sys.modules["library_of_a_test"]


class _Gpt(nn.Module):
    """The matrices of GPT-2's block, by transformers' own class, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        conv = pytest.importorskip("transformers.pytorch_utils").Conv1D
        self.up, self.down, self.head = conv(6, 4), conv(4, 6), nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head((x + self.down(self.up(x).relu())).mean(1))


def test_the_transposed_matrices_of_gpt2_have_the_traces_of_dense_hessians():
    torch.manual_seed(0)
    net = _Gpt().double().eval()
    nn.init.normal_(net.up.weight), nn.init.normal_(net.down.weight)
    batch = torch.randn(4, 3, 4, dtype=torch.float64), torch.arange(4) % 3
    table = check_traces(net, batch, _loss, exact=("up", "down", "head"))
    assert {x.name: x.type for x in table.layers} == {"up": "Conv1D", "down": "Conv1D", "head": "Linear"}
    assert [s.channels for s in table.weights] == [6, 4, 3]
