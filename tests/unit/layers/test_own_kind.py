"""Kinds of layers from a user's own file: 3-D weights, several weights, weights of a child, look-ups."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from hawq_lightning import HawqError, Plan, candidates, load_packed, measure, quantize, save_packed, select
from hawq_lightning.layers import (
    FakeQuantLayer,
    LayerCall,
    LayerKind,
    WeightRead,
    inner_products,
    register_layer,
    row_dots,
)
from hawq_lightning.quantization import enabled_bits, plan_of, unquantize
from hawq_lightning.selection import Problem
from hawq_lightning.sensitivity import find_sites
from tests.cases import dense_activation_traces, dense_weight_traces


class Experts(nn.Module):
    """``y[n, e] = W[e] x[n, e]``, read by a keyword of its own."""

    def __init__(self, experts: int, features: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(experts, outputs, features) / features**0.5)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return _experts(tokens, self.weight)


def _experts(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return torch.einsum("nei,eoi->neo", x, weight)


class QExperts(FakeQuantLayer, Experts):
    float_type = Experts

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.quantized_product(_experts, tokens, self.weight)


@register_layer("experts_of_a_test")
class ExpertsKind(LayerKind):
    """One scale for each output, which the experts share."""

    float_type, fake_quant_type = Experts, QExperts
    input_name = "tokens"
    channel_axis = 1

    def macs(self, module: nn.Module, parameter: str, x: torch.Tensor, output: torch.Tensor) -> int:
        return output.numel() * x.shape[-1]

    def weight_gradients(self, calls: Sequence[LayerCall], per_sample: bool) -> Iterator[Any]:
        def total(grads: Sequence[torch.Tensor]) -> torch.Tensor:
            g = sum(torch.einsum("nei,neo->neoi", c.read, grad) for c, grad in zip(calls, grads))
            assert isinstance(g, torch.Tensor)
            return g if per_sample else g.sum(0, keepdim=True)

        g = total([c.grad for c in calls])
        yield g, total([c.grad if c.other is None else c.other for c in calls])


class Mixture(nn.Module):
    """Two layers of experts that share a weight, called by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Experts(2, 3, 3), Experts(2, 3, 3)
        self.second.weight = self.first.weight
        self.head = nn.Linear(3, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(tokens=x).relu() + self.second(tokens=x.flip(1)).relu()
        return self.head(input=x.mean(1))


class Pair(nn.Module):
    """Two weights of one module, one of which a child holds: ``V relu(U x)``."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(5, 3))
        self.holder = nn.ParameterDict({"down": nn.Parameter(torch.randn(4, 5))})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _pair(self, x, F.linear)


def _pair(module: Pair, x: torch.Tensor, product: Any) -> torch.Tensor:
    inner = _product(module, "up", x, product)
    return _product(module, "holder.down", inner.relu(), product)


def _product(module: Pair, parameter: str, x: torch.Tensor, product: Any) -> torch.Tensor:
    shown: dict[str, list[Any]] = PairKind.shown.get(id(module), {})
    for visit in shown.get(f"read {parameter}", []):
        x = visit(x)
    weight = module.up if parameter == "up" else module.holder["down"]
    y = product(x, weight) if product is F.linear else product(parameter, x, weight)
    for record in shown.get(f"call {parameter}", []):
        y = y if (replaced := record(x, y)) is None else replaced
    return y


class QPair(FakeQuantLayer, Pair):
    float_type = Pair

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _pair(self, x, lambda p, x, w: self.quantized_product(F.linear, x, w, parameter=p))


class _Handle:
    def __init__(self, entries: list[Any], entry: Any) -> None:
        self._entries, self._entry = entries, entry
        entries.append(entry)

    def remove(self) -> None:
        self._entries.remove(self._entry)


@register_layer("pair_of_a_test")
class PairKind(LayerKind):
    """Both products are calls of a function."""

    float_type, fake_quant_type = Pair, QPair
    shown: ClassVar[dict[int, dict[str, list[Any]]]] = {}

    def weights(self, module: nn.Module) -> Mapping[str, WeightRead]:
        return {"up": WeightRead(0), "holder.down": WeightRead(0)}

    def on_read(self, module: nn.Module, parameter: str, visit: Any) -> Any:
        return _Handle(self.shown.setdefault(id(module), {}).setdefault(f"read {parameter}", []), visit)

    def on_call(self, module: nn.Module, parameter: str, record: Any) -> Any:
        return _Handle(self.shown.setdefault(id(module), {}).setdefault(f"call {parameter}", []), record)

    def weight_gradients(self, calls: Sequence[LayerCall], per_sample: bool) -> Iterator[Any]:
        (call,) = calls
        g = torch.einsum("no,ni->noi", call.grad, call.read)
        h = g if call.other is None else torch.einsum("no,ni->noi", call.other, call.read)
        yield (g, h) if per_sample else (g.sum(0, keepdim=True), h.sum(0, keepdim=True))


class Paired(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.pair, self.head = Pair(), nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.pair(x).relu())


class Words(nn.Embedding):
    pass


class QWords(FakeQuantLayer, Words):
    float_type = Words

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.embedding(input, self.quantized_weight)


@register_layer("words_of_a_test")
class WordsKind(LayerKind):
    """A look-up: what it reads is no activation."""

    float_type, fake_quant_type = Words, QWords

    def weights(self, module: nn.Module) -> Mapping[str, WeightRead]:
        return {"weight": WeightRead(0, reads_activation=False)}

    def weight_gradients(self, calls: Sequence[LayerCall], per_sample: bool) -> Iterator[Any]:
        (call,) = calls
        one_hot = F.one_hot(call.read, call.layer.num_embeddings).to(call.grad)
        g = torch.einsum("nlv,nld->nvd", one_hot, call.grad)
        yield (g, g) if per_sample else (g.sum(0, keepdim=True), g.sum(0, keepdim=True))


@pytest.mark.parametrize("norm", [nn.LayerNorm(4), nn.Identity()])
def test_a_norm_behind_a_look_up_is_seen_by_the_default_estimator(norm):
    torch.manual_seed(0)
    net = nn.Sequential(Words(9, 4), norm, nn.Flatten(), nn.Linear(8, 3)).double()
    batch = torch.randint(0, 9, (6, 2)), torch.arange(6) % 3
    notes = [n for n in measure(net, [batch], _loss, rtol=0.5, progress=False).notes if "piecewise" in n]
    assert not notes if isinstance(norm, nn.Identity) else "example at 0:" in notes[0]


SITES = {
    Mixture: ["first.weight", "head.weight", "first.input", "second.input", "head.input"],
    Paired: ["pair.up", "pair.holder.down", "head.weight", "pair.up.input", "pair.holder.down.input", "head.input"],
}


def _loss(model: nn.Module, batch: Any) -> torch.Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def _case(kind: type[nn.Module]) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    x = torch.randn(4, 2, 3) if kind is Mixture else torch.randn(4, 3)
    return kind().double().eval(), (x.double(), torch.tensor([0, 1, 2, 1]))


@pytest.mark.parametrize("kind", [Mixture, Paired])
def test_traces_of_weights_and_activations_are_the_dense_ones(kind):
    net, batch = _case(kind)
    table = find_sites(net, lambda: _loss(net, batch), 4)
    assert [s.name for s in table] == SITES[kind]
    readers = dict(net.named_parameters(remove_duplicate=False))
    assert all(readers[s.name].shape == s.shape for s in table.weights)
    truth = dense_weight_traces(net, batch, _loss, table) | dense_activation_traces(net, batch, _loss, table)
    for r in measure(net, [batch], _loss, sites=table, estimator="exact", progress=False):
        assert r.trace == pytest.approx(truth[r.name], rel=1e-8, abs=1e-10), r.name


@pytest.mark.parametrize("kind", [Mixture, Paired])
def test_a_plan_is_installed_and_taken_out_again(kind):
    net, batch = _case(kind)
    net, batch = net.float(), (batch[0].float(), batch[1])
    table = find_sites(net, lambda: _loss(net, batch), 4)
    traces = measure(net, [batch], _loss, sites=table, rtol=0.5, progress=False)
    choices = candidates(net, [batch], traces, table, _loss)
    plan = Plan.from_dict(select(Problem(table, choices, traces), budget="8x").to_dict())
    before, keys = net(batch[0]).detach(), list(net.state_dict())
    quantize(net, plan)
    assert enabled_bits(net) == {s.name: s.bits for s in plan.sites} | (
        {"second.weight": plan["first.weight"].bits} if kind is Mixture else {}
    )
    assert [s.name for s in plan_of(net).weights] == [s.name for s in plan.weights]
    assert not torch.equal(net(batch[0]), before)
    net.train()
    _loss(net, batch).backward()
    assert all(p.grad is not None for p in net.parameters())
    unquantize(net)
    assert torch.equal(net(batch[0]), before) and list(net.state_dict()) == keys


def test_a_packed_file_brings_back_a_weight_of_three_axes(tmp_path):
    net, batch = _case(Mixture)
    net, batch = net.float(), (batch[0].float(), batch[1])
    table = find_sites(net, lambda: _loss(net, batch), 4)
    traces = measure(net, [batch], _loss, sites=table, rtol=0.5, progress=False)
    plan = select(Problem(table, candidates(net, [batch], traces, table, _loss), traces), budget="8x")
    save_packed(quantize(net, plan), plan, tmp_path / "net")
    assert torch.equal(load_packed(tmp_path / "net", Mixture().eval())(batch[0]), net(batch[0]))


def test_kinds_that_share_a_weight_add_their_gradients():
    """An ``nn.Linear`` and a layer of one expert with the same matrix."""
    torch.manual_seed(0)
    linear, experts = nn.Linear(3, 4, bias=False), Experts(1, 3, 4)

    @register_layer("matrix_of_a_test")
    class MatrixKind(LayerKind):
        float_type, fake_quant_type = type("Matrix", (nn.Linear,), {}), QExperts

        def weight_gradients(self, calls: Sequence[LayerCall], per_sample: bool) -> Iterator[Any]:
            g = sum(torch.einsum("no,ni->noi", c.grad, c.read) for c in calls)
            yield g, g

    other = MatrixKind.float_type(3, 4, bias=False)
    x, y, g, h = torch.randn(5, 3), torch.randn(5, 3), torch.randn(5, 4), torch.randn(5, 4)
    both = torch.einsum("no,ni->noi", g, x) + torch.einsum("no,ni->noi", h, y)
    products = inner_products([LayerCall(linear, x, g), LayerCall(other, y, h)], True)
    assert torch.allclose(products, row_dots(both, both))
    del experts


def test_what_a_kind_lacks_is_named():
    class Nothing(LayerKind):
        pass

    class Again(LayerKind):
        float_type, fake_quant_type = nn.Linear, QExperts

    for make, message in (
        (lambda: register_layer("nothing")(Nothing), "'nothing' has no float_type"),
        (lambda: register_layer("again")(Again), "Linear is of the layer kind 'linear' already"),
        (lambda: register_layer("linear")(ExpertsKind), "Experts is of the layer kind 'experts_of_a_test' already"),
        (lambda: inner_products([LayerCall(nn.ReLU(), torch.ones(1), torch.ones(1))], True), "ReLU is no layer kind"),
    ):
        with pytest.raises(HawqError, match=message):
            make()
