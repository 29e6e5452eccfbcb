"""Layers with parametrizations: the weight that the forward pass computes is measured, quantized and packed."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import orthogonal, spectral_norm, weight_norm

from hawq_lightning import load_packed, measure, quantize, save_packed
from hawq_lightning.export import deploy
from hawq_lightning.quantization import enabled_bits, plan_of, unquantize
from hawq_lightning.sensitivity import find_sites
from tests.cases import dense_activation_traces, dense_weight_traces
from tests.layer_checks import plan_for


class Centred(nn.Module):
    """A parametrization of the user's own: rows without their mean."""

    def forward(self, w: torch.Tensor) -> torch.Tensor:
        return w - w.mean(1, keepdim=True)


def _own(layer: nn.Module) -> nn.Module:
    return parametrize.register_parametrization(layer, "weight", Centred())


def _two(layer: nn.Module) -> nn.Module:
    return parametrize.register_parametrization(weight_norm(layer), "weight", Centred())


MAKERS = {
    "weight_norm": weight_norm,
    "spectral_norm": spectral_norm,
    "orthogonal": orthogonal,
    "own": _own,
    "two": _two,
}


class Net(nn.Module):
    """A convolution and a linear layer that are parametrized, the latter called in series."""

    def __init__(self, make) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.inner, self.out = make(nn.Conv2d(2, 4, 2)), make(nn.Linear(4, 4)), nn.Linear(4, 3)

    def forward(self, x):
        x = F.relu(self.conv(x)).mean((2, 3))
        return self.out(torch.tanh(self.inner(torch.tanh(self.inner(x)))))


def _loss(m, b):
    return F.cross_entropy(m(b[0]), b[1])


def _batch(dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(5, 2, 4, 4, dtype=dtype, generator=generator), torch.arange(5) % 3


@pytest.mark.parametrize("maker", ["weight_norm", "spectral_norm", "two"])
def test_traces_are_by_the_weight_that_the_forward_pass_uses(maker):
    net, batch = Net(MAKERS[maker]).double().eval(), _batch(torch.float64)
    plain = Net(MAKERS[maker]).double().eval()  # a deep copy would lose its weight: the two share a class
    plain.load_state_dict(net.state_dict())
    for layer in (plain.conv, plain.inner):
        parametrize.remove_parametrizations(layer, "weight")
    table = find_sites(plain, lambda: _loss(plain, batch), 5)
    truth = dense_weight_traces(plain, batch, _loss, table) | dense_activation_traces(plain, batch, _loss, table)
    state = {k: v.clone() for k, v in net.state_dict().items()}
    net.train()  # where spectral norm iterates at every call
    traces = measure(net, [batch], _loss, estimator="hessian", rtol=0.2, max_probes=16, progress=False)
    assert {r.name for r in traces} == set(truth)
    for r in traces:
        assert abs(r.trace - truth[r.name]) <= 4.5 * r.stderr + 1e-6, (r, truth[r.name])
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())
    assert type(net.conv).__name__ == "ParametrizedConv2d" and parametrize.is_parametrized(net.inner, "weight")


@pytest.mark.parametrize("maker", MAKERS)
def test_it_is_quantized_trained_copied_packed_deployed_and_taken_out_again(maker, tmp_path):
    net, batch = Net(MAKERS[maker]).eval(), _batch()
    before = net(batch[0])
    plan = plan_for(net, batch, _loss)
    quantize(net, plan)
    assert {"conv.weight", "inner.weight", "out.weight"} <= enabled_bits(net).keys()
    assert [s.name for s in plan_of(net).weights] == [s.name for s in plan.weights]
    quantized = net(batch[0])
    assert len(torch.unique(net.inner.weight_quantizer(net.inner.weight)[0])) <= 2**net.inner.weight_quantizer.bits
    assert not torch.equal(quantized, before) and torch.equal(copy.deepcopy(net)(batch[0]), quantized)

    save_packed(net, plan, tmp_path / "net")
    other = load_packed(tmp_path / "net", Net(MAKERS[maker]).eval())
    assert torch.equal(other(batch[0]), quantized)
    assert not any("parametrizations" in k for k in other.state_dict())  # codes have taken their place
    assert torch.allclose(deploy(net, plan, batch[0]).model(batch[0]), quantized, atol=1e-5)

    step = copy.deepcopy(net).train()
    start = {n: p.detach().clone() for n, p in step.named_parameters()}
    _loss(step, batch).backward()
    torch.optim.SGD(step.parameters(), 0.1).step()
    moved = {n for n, p in step.named_parameters() if not torch.equal(p, start[n])}
    assert {n.split(".")[0] for n in moved if "parametrizations" in n} == {"conv", "inner"}
    assert torch.equal(unquantize(net)(batch[0]), before)


def test_no_part_of_it_is_in_the_table_of_what_stays_float():
    net = Net(weight_norm)
    table = find_sites(net, lambda: net(_batch()[0]), 5)
    assert not any("conv" in f.name or "inner" in f.name for f in table.floats)
