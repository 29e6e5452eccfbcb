"""Kinds of layers from a user's own file: 3-D weights, several weights, weights of a child, look-ups."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from hawq_lightning import HawqError, Plan, candidates, measure, quantize, select
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
from tests.own_kinds import Experts, ExpertsKind, Gated, Mixture, Paired, QExperts


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
    Gated: ["gate.value", "gate.gate", "head.weight", "gate.value.input", "head.input"],
}


def _loss(model: nn.Module, batch: Any) -> torch.Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def _case(kind: type[nn.Module]) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    x = torch.randn(4, 2, 3) if kind is Mixture else torch.randn(4, 3)
    return kind().double().eval(), (x.double(), torch.tensor([0, 1, 2, 1]))


@pytest.mark.parametrize("kind", [Mixture, Paired])  # a gate bends, so that Gauss-Newton is not all of it
def test_traces_of_weights_and_activations_are_the_dense_ones(kind):
    net, batch = _case(kind)
    table = find_sites(net, lambda: _loss(net, batch), 4)
    assert [s.name for s in table] == SITES[kind]
    readers = dict(net.named_parameters(remove_duplicate=False))
    assert all(readers[s.name].shape == s.shape for s in table.weights)
    truth = dense_weight_traces(net, batch, _loss, table) | dense_activation_traces(net, batch, _loss, table)
    for r in measure(net, [batch], _loss, sites=table, estimator="exact", progress=False):
        assert r.trace == pytest.approx(truth[r.name], rel=1e-8, abs=1e-10), r.name


@pytest.mark.parametrize("kind", list(SITES))
def test_a_plan_is_installed_and_taken_out_again(kind):
    net, batch = _case(kind)
    net, batch = net.float(), (batch[0].float(), batch[1])
    table = find_sites(net, lambda: _loss(net, batch), 4)
    traces = measure(net, [batch], _loss, sites=table, rtol=0.5, progress=False)
    choices = candidates(net, [batch], traces, table, _loss)
    plan = Plan.from_dict(select(Problem(table, choices, traces), budget="8x").to_dict())
    before, keys = net(batch[0]).detach(), list(net.state_dict())
    quantize(net, plan)
    others = {"second.weight": "first.weight"} if kind is Mixture else {}
    others |= {"gate.gate.input": "gate.value.input"} if kind is Gated else {}
    assert enabled_bits(net) == plan.bits | {name: plan[first].bits for name, first in others.items()}
    assert [s.name for s in plan_of(net).weights] == [s.name for s in plan.weights]
    assert not torch.equal(net(batch[0]), before)
    net.train()
    _loss(net, batch).backward()
    assert all(p.grad is not None for p in net.parameters())
    unquantize(net)
    assert torch.equal(net(batch[0]), before) and list(net.state_dict()) == keys


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
