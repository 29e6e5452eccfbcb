"""Layers whose methods somebody has replaced, of one module or of a class: computed as they are called, or float."""

from __future__ import annotations

import copy
import functools
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from hawq_lightning import HawqError, load_packed, measure, quantize, save_packed, sites
from hawq_lightning.export import deploy
from hawq_lightning.layers import deep_copy
from hawq_lightning.quantization import unquantize
from tests.cases import dense_weight_traces
from tests.layer_checks import plan_for, table_of

LAYERS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(6, 6),
    "conv1d": lambda: nn.Conv1d(2, 2, 3, padding=1),
    "conv2d": lambda: nn.Conv2d(2, 2, 3, padding=1),
    "transposed": lambda: nn.ConvTranspose2d(2, 2, 3, padding=1),
    "embedding": lambda: nn.Embedding(5, 6),
}
SHAPES = {"conv1d": (2, 3), "conv2d": (2, 3, 1), "transposed": (2, 3, 1)}


def around(forward: Callable[..., torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    return forward(x) * 2 + 1


def wrapped(layer: nn.Module) -> None:
    forward = layer.forward
    layer.forward = lambda x: around(forward, x)


def by_default(layer: nn.Module) -> None:
    def call(x: torch.Tensor, forward: Any = layer.forward) -> torch.Tensor:
        return around(forward, x)

    layer.forward = call


def with_hook(layer: nn.Module) -> None:
    """As libraries attach hooks: the old forward is kept beside."""
    layer._old_forward = layer.forward

    def call(module: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        return around(functools.partial(module._old_forward, **kwargs), *args)

    layer.forward = functools.update_wrapper(functools.partial(call, layer), layer._old_forward)


def method(layer: nn.Module) -> None:
    def call(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return around(functools.partial(plain, self), x)

    plain = type(layer).forward
    layer.forward = types.MethodType(call, layer)


WAYS = [wrapped, by_default, with_hook, method]


class Net(nn.Module):
    def __init__(self, kind: str, way: Callable[[nn.Module], None] | None = None) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.kind, self.first, self.last = kind, nn.Linear(6, 6), nn.Linear(6, 3)
        self.layer = LAYERS[kind]()
        if way is not None:
            way(self.layer)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.first(x).tanh()
        y = self.layer((x[:, 0].abs() * 2).long() % 5 if self.kind == "embedding" else self._shaped(h))
        return self.last(h + y.reshape(len(x), 6))

    def _shaped(self, h: torch.Tensor) -> torch.Tensor:
        return h.reshape(len(h), *SHAPES[self.kind]) if self.kind in SHAPES else h


def loss_of(model: nn.Module, batch: Any) -> torch.Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def batch_of(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(5)
    return torch.randn(8, 6, dtype=dtype), torch.arange(8) % 3


@pytest.mark.parametrize("way", WAYS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("kind", LAYERS)
def test_a_layer_computes_with_its_codes_through_what_was_put_around_it(kind, way, tmp_path: Path):
    net, batch = Net(kind, way).eval(), batch_of()
    mine = net.layer.forward
    with torch.no_grad():
        before = net(batch[0])
    plan = plan_for(net, batch, loss_of)
    assert "layer.weight" in plan.bits
    quantize(net, plan)
    by_hand = Net(kind, way).eval()  # float, with the weights that the quantizers give
    with torch.no_grad():
        quantized = net(batch[0])
        by_hand.layer.weight.copy_(net.layer.weight_quantizer(net.layer.weight))
        for name in ("first", "last"):
            layer, plain = getattr(net, name), getattr(by_hand, name)
            plain.weight.copy_(layer.quantized_weight)
            plain.register_forward_pre_hook(lambda m, x, read=layer.input_quantizer: (read(x[0]),))
        torch.testing.assert_close(quantized, by_hand(batch[0]))
        assert not torch.allclose(by_hand.layer.weight, net.layer.weight)
        save_packed(net, plan, tmp_path / "net")
        assert torch.equal(load_packed(tmp_path / "net", Net(kind, way).eval())(batch[0]), quantized)
        copied = copy.deepcopy(net)
        assert torch.equal(copied(batch[0]), quantized)
        copied.layer.weight.zero_()
        assert torch.equal(net(batch[0]), quantized) and not torch.equal(copied(batch[0]), quantized)
        small = deploy(net, plan, batch[0])
        torch.testing.assert_close(small.model(batch[0]), quantized)
        unquantize(net)
        assert torch.equal(net(batch[0]), before)
    assert net.layer.forward == mine


@pytest.mark.parametrize("way", WAYS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("kind", LAYERS)
def test_traces_are_those_of_what_is_called(kind, way):
    net, batch = Net(kind, way).double().eval(), batch_of(torch.float64)
    mine = net.layer.__dict__["forward"]
    table = table_of(net, batch, loss_of)
    found = {r.name: r.trace for r in measure(net, [batch], loss_of, sites=table, estimator="exact", progress=False)}
    truth = dense_weight_traces(net, batch, loss_of, table)
    for name in ("layer.weight", "last.weight"):
        assert found[name] == pytest.approx(truth[name], rel=1e-7), name
    assert net.layer.__dict__["forward"] is mine


@pytest.mark.parametrize("way", WAYS, ids=lambda f: f.__name__)
def test_copies_call_themselves(way):
    net, (x, _) = Net("linear", way), batch_of()
    copied = deep_copy(net)
    with torch.no_grad():
        before = net(x)
        copied.layer.weight.zero_()
        assert torch.equal(net(x), before) and not torch.allclose(copied(x), before)


def circular(self: nn.Conv2d, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return F.conv2d(F.pad(x, (1, 1, 1, 1), "circular"), weight, bias)


@pytest.mark.parametrize("whole_class", [False, True])
@pytest.mark.parametrize("kind", ["conv2d", "linear"])
def test_padding_of_another_kind_and_methods_of_a_class(kind, whole_class, monkeypatch, tmp_path: Path):
    name, put = ("_conv_forward", circular) if kind == "conv2d" else ("forward", doubled)
    net, batch = Net(kind).double().eval(), batch_of(torch.float64)
    if whole_class:
        monkeypatch.setattr(type(net.layer), name, put)
    else:
        setattr(net.layer, name, types.MethodType(put, net.layer))
    table = table_of(net, batch, loss_of)
    found = {r.name: r.trace for r in measure(net, [batch], loss_of, sites=table, estimator="exact", progress=False)}
    truth = dense_weight_traces(net, batch, loss_of, table)
    assert found["layer.weight"] == pytest.approx(truth["layer.weight"], rel=1e-7)
    net, batch = net.float(), batch_of()
    plan = plan_for(net, batch, loss_of)
    by_hand = copy.deepcopy(net)
    quantize(net, plan)
    with torch.no_grad():
        for n in ("first", "layer", "last"):
            layer, plain = getattr(net, n), getattr(by_hand, n)
            plain.weight.copy_(layer.weight_quantizer(layer.weight))
            if layer.input_quantizer.bits:
                plain.register_forward_pre_hook(lambda m, x, read=layer.input_quantizer: (read(x[0]),))
        torch.testing.assert_close(net(batch[0]), by_hand(batch[0]))


def doubled(self: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    return F.linear(2 * x, self.weight, self.bias)


def test_a_forward_that_was_put_back_is_that_of_the_class():
    net, batch = Net("linear").eval(), batch_of()
    net.layer.forward = net.layer.forward  # as after a library has taken its hooks off
    plan = plan_for(net, batch, loss_of)
    assert plan.bits.keys() == plan_for(Net("linear").eval(), batch, loss_of).bits.keys()
    with torch.no_grad():
        before = net(batch[0])
        quantize(net, plan)
        assert not torch.equal(net(batch[0]), before)


def test_attention_whose_forward_was_replaced_is_told():
    class Attended(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn, self.head = nn.MultiheadAttention(6, 2, batch_first=True), nn.Linear(6, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x[:, None].expand(-1, 3, -1)
            return self.head(self.attn(x, x, x)[0].mean(1))

    net, batch = Attended().eval(), batch_of()
    forward = net.attn.forward
    net.attn.forward = lambda *args, **kwargs: forward(*args, **(kwargs | {"need_weights": True}))
    told = {f.name: f.reason for f in sites(net, batch, forward=loss_of).floats}
    assert told["attn"] == "another forward was put in the place of that of MultiheadAttention"


def test_a_layer_that_writes_to_its_weight_stays_float():
    class Limited(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            self.weight.data = torch.renorm(self.weight.data, 2, 0, 0.1)
            return super().forward(input)

    net = nn.Sequential(nn.Linear(6, 4), Limited(4, 3))
    plan = plan_for(net, batch_of(), loss_of)
    assert plan.bits.keys() == {"0.weight", "0.input"}
    told = {f.name: f.reason for f in sites(net, batch_of(), forward=loss_of).floats}
    assert told["1"].startswith("its forward writes to its weight")
    with pytest.raises(HawqError, match="0 stays float, since its forward writes to its weight"):
        sites(nn.Sequential(Limited(6, 3)), batch_of(), forward=loss_of)
    net[1].weight.data.normal_()
    net.train()(batch_of()[0])
    assert float(net[1].weight.norm(dim=1).max()) <= 0.1001
