"""Quantized operands are made again for the backward pass: the same gradients, nothing kept twice."""

import weakref

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from hawq_lightning.quantization import quantize, quantizer_named, with_quantizer
from tests.cases import ConvNet, Sequence1d, SharedHead, Tied, Volume, build
from tests.internals import internal
from tests.unit.quantization.test_compile import plan_for
from tests.unit.quantization.test_post_training import inputs


def gradients(model, x):
    out = model(x)
    loss = sum(o.square().sum() for o in out) if isinstance(out, tuple) else out.square().sum()
    return torch.autograd.grad(loss, [x, *(p for p in model.parameters() if p.requires_grad)], allow_unused=True)


@pytest.mark.parametrize("kind", [ConvNet, SharedHead, Sequence1d, Volume, Tied])
@pytest.mark.parametrize("quantizer", ["uniform", "lsq"])
def test_gradients_are_bitwise_those_of_kept_operands(kind, quantizer, monkeypatch):
    model = build(kind).float()
    quantize(model, plan_for(model, quantizer=quantizer))
    x = inputs(kind, 1, 4)[0].requires_grad_()
    mine = gradients(model, x)
    monkeypatch.setattr(internal("layers._recompute"), "_others_decide", lambda: True)
    kept = gradients(model, x)
    assert all((a is None and b is None) or torch.equal(a, b) for a, b in zip(mine, kept))
    assert any(g is not None and g.abs().sum() > 0 for g in mine)


@pytest.mark.parametrize("quantizer", ["uniform", "lsq"])
def test_no_quantized_copy_outlives_the_forward_pass(quantizer):
    model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3))
    quantize(model, plan_for(model, quantizer=quantizer))
    x = torch.randn(8, 4, 16, 16)
    watch = []
    original = type(model[2].input_quantizer).quantize

    def spy(self, x):
        out = original(self, x)
        watch.append(weakref.ref(out))
        return out

    spy.deterministic = True
    kind = type(model[2].input_quantizer)
    kind.quantize = spy
    try:
        out = model(x)
        assert watch and all(ref() is None for ref in watch)  # though the graph is alive
        made = len(watch)
        out.sum().backward()
        assert len(watch) == 2 * made  # made again, once each
    finally:
        kind.quantize = original


def test_inputs_overwritten_later_are_noticed():
    model = nn.Sequential(nn.Linear(4, 4))
    quantize(model, plan_for(model))
    x = torch.randn(3, 4)
    out = model(x)
    x.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an in-place operation"):
        out.sum().backward()


def test_stateful_quantizers_run_once():
    model = nn.Sequential(nn.Linear(4, 4))
    quantize(model, with_quantizer(plan_for(model), quantizer_named("int_only")))  # its ranges follow the weights
    model.train()
    calls = []
    quantizer = model[0].weight_quantizer
    look = quantizer._range
    quantizer._range = lambda *a: calls.append(1) or look(*a)
    model(torch.randn(3, 4)).sum().backward()
    assert len(calls) == 1


def test_activation_checkpointing_keeps_its_way():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    quantize(model, plan_for(model))
    x = torch.randn(5, 4, requires_grad=True)
    plain = torch.autograd.grad(model(x).square().sum(), [x, *model.parameters()])
    again = torch.autograd.grad(checkpoint(model, x, use_reentrant=False).square().sum(), [x, *model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(plain, again))


@pytest.mark.parametrize("quantizer", ["uniform", "lsq", "pact", "lq_nets"])
def test_the_backward_pass_of_a_quantizer_takes_no_memory(quantizer):
    model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3))
    quantize(model, with_quantizer(plan_for(model), quantizer_named(quantizer)))
    model.train()
    out = model(torch.randn(8, 4, 64, 64))
    with torch.profiler.profile(profile_memory=True) as seen:
        out.sum().backward()
    found = {e.key: e for e in seen.key_averages()}["aten::hardtanh_backward"]
    assert found.count and found.self_cpu_memory_usage == 0


@pytest.mark.parametrize("quantizer", ["uniform", "lsq", "pact", "lq_nets"])
def test_gradients_that_others_may_read_are_left_alone(quantizer):
    model = nn.Sequential(nn.Linear(6, 6))
    quantize(model, with_quantizer(plan_for(model), quantizer_named(quantizer)))
    x = torch.linspace(-9, 9, 30).reshape(5, 6).requires_grad_()
    given = torch.ones(5, 6)
    direct = torch.autograd.grad(model[0].input_quantizer(x), x, given)[0]
    assert bool((direct == 0).any()) and bool((given == 1).all())
    plain = torch.autograd.grad(model(x).square().sum(), x)[0]
    with_graph = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)[0]
    assert torch.equal(plain, with_graph.detach())
