"""Weights that a module's own forward reads: fused experts, and subclasses of layers that compute something else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from hawq_lightning import candidates, load_packed, measure, quantize, save_packed, select
from hawq_lightning.export import deploy
from hawq_lightning.selection import Problem
from hawq_lightning.sensitivity import find_sites
from tests.layer_checks import check_quantized, check_traces


class Experts(nn.Module):
    """Three experts of two matrices, read in one of the usual ways."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.up, self.down = nn.Parameter(torch.randn(3, 4, 6)), nn.Parameter(torch.randn(3, 6, 4) / 3)
        self.bias = nn.Parameter(torch.randn(3, 6))

    def forward(self, x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        if self.how == "einsum":
            h = torch.einsum("nd,edh->neh", x, self.up).add(self.bias).relu()
            return torch.einsum("ne,neh,ehd->nd", gate, h, self.down)
        if self.how == "bmm":
            h = torch.bmm(x.expand(3, -1, -1), self.up).add(self.bias[:, None]).relu()
            return (torch.bmm(h, self.down) * gate.T[..., None]).sum(0)
        y = torch.zeros_like(x)
        for e in range(3):
            rows = gate.argmax(1) == e
            y[rows] = gate[rows, e, None] * ((x[rows] @ self.up[e] + self.bias[e]).relu() @ self.down[e])
        return y


class Mixture(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.gate, self.experts, self.head = nn.Linear(4, 3), Experts(how), nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(x + self.experts(x, self.gate(x).softmax(-1)))


class Scaled(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(2 * input)


class Adapted(nn.Linear):
    """A frozen matrix, and one of low rank that is trained."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.weight.requires_grad_(False)
        self.a, self.b = nn.Parameter(torch.randn(2, inputs)), nn.Parameter(torch.randn(outputs, 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight, self.bias) + x @ self.a.T @ self.b.T


class Standardised(nn.Conv2d):
    def _conv_forward(self, input: torch.Tensor, weight: torch.Tensor, bias: Any) -> torch.Tensor:
        std, mean = torch.std_mean(weight, dim=(1, 2, 3), keepdim=True)
        return super()._conv_forward(input, (weight - mean) / (std + 0.1), bias)


class Padded(nn.ConvTranspose2d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.conv_transpose2d(F.pad(x, (0, 1, 0, 1)), self.weight, self.bias)


class Subclasses(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.up = Standardised(1, 3, (1, 3)), Padded(3, 2, 2)
        self.scaled, self.adapted, self.head = Scaled(24, 5), Adapted(5, 5), nn.Linear(5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.up(self.conv(x[:, None, None]).relu())
        return self.head(self.adapted(self.scaled(x.flatten(1)).relu()))


NETS = {"einsum": Mixture, "bmm": Mixture, "loop": Mixture, "subclasses": lambda _: Subclasses()}


def _build(name: str) -> nn.Module:
    torch.manual_seed(0)
    return NETS[name](name).eval()


def _loss(model: nn.Module, batch: Any) -> torch.Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def _batch(dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(1)
    return torch.randn(3, 4, dtype=dtype), torch.arange(3)  # as many samples as experts


@pytest.mark.parametrize("name", ["einsum", "loop", "subclasses"])
def test_traces_are_the_dense_ones(name):
    exact = ("head", "adapted", "scaled") if name == "subclasses" else ("head", "experts.down")
    table = check_traces(_build(name).double().requires_grad_(True), _batch(torch.float64), _loss, exact=exact)
    weights = {s.name for s in table.weights}
    assert weights > ({"experts.up", "experts.down"} if name != "subclasses" else {"conv.weight", "up.weight"})
    assert not any(s.name.startswith(("experts", "conv", "up")) for s in table.activations)
    floats = {f.name: f.reason for f in table.floats}
    beside = (
        {"adapted": "beside its weights: a, b"} if name == "subclasses" else {"experts": "beside its weights: bias"}
    )
    assert beside.items() <= floats.items()


@pytest.mark.parametrize("name", ["bmm", "loop"])
def test_experts_are_quantized_trained_packed_and_deployed(name, tmp_path):
    net = check_quantized(lambda: _build(name), _batch(), _loss, tmp_path)
    assert net.experts.up_quantizer.scale.shape == (3,)
    x = _batch()[0]
    if name == "bmm":
        assert torch.allclose(deploy(net, None, x).model(x), net(x), atol=1e-5)


def test_subclasses_are_quantized_and_packed(tmp_path):
    net, batch = _build("subclasses"), _batch()
    table = find_sites(net, lambda: _loss(net, batch), 3)
    traces = measure(net, [batch], _loss, sites=table, max_probes=4, progress=False)
    plan = select(Problem(table, candidates(net, [batch], traces, table, _loss), traces), budget="8x")
    expected = quantize(net, plan)(batch[0])
    assert net.up.weight_quantizer.scale.shape == (2,) and isinstance(net.conv, Standardised)
    assert len(torch.unique(net.scaled.weight_quantizer(net.scaled.weight)[0])) <= 2**net.scaled.weight_quantizer.bits
    save_packed(net, plan, tmp_path / "net")
    assert torch.equal(load_packed(tmp_path / "net", _build("subclasses"))(batch[0]), expected)


@pytest.mark.parametrize("family", ["Mixtral", "Qwen2Moe", "Llama4Text"])
def test_the_experts_of_transformers_are_sites(family):
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 20, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1, "pad_token_id": 0}
    more = {
        "Mixtral": {"num_local_experts": 3},
        "Qwen2Moe": {
            "num_experts": 3,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 12,
            "shared_expert_intermediate_size": 12,
        },
        "Llama4Text": {"num_local_experts": 3, "intermediate_size_mlp": 24, "head_dim": 8},
    }[family]
    model = getattr(transformers, f"{family.removesuffix('Text')}ForCausalLM")
    torch.manual_seed(0)
    net = model(getattr(transformers, f"{family}Config")(**sizes, **more)).eval()
    ids = torch.randint(0, 20, (2, 5))

    def loss(m, b):
        return m(input_ids=b[0], labels=b[0]).loss

    table = find_sites(net, lambda: loss(net, (ids,)), 2)
    stacks = [s.name for s in table.weights if "experts" in s.name and "shared" not in s.name]
    assert [name.rpartition(".")[2] for name in stacks] == ["gate_up_proj", "down_proj"]
    traces = measure(net, [(ids,)], loss, sites=table, max_probes=2, progress=False)
    assert all(traces[name].trace > 0 for name in stacks)


@pytest.mark.parametrize("how", ["einsum", "bmm", "loop"])
def test_what_experts_multiply_is_counted_with_each_weight(how: str) -> None:
    x = torch.randn(8, 4)
    table = find_sites(net := Mixture(how), lambda: net(x), 8)
    times = 1 if how == "loop" else 3  # an expert for each token, or all
    macs = {layer.name: layer.macs for layer in table.layers}
    assert macs["experts.up"] == times * 24
    if how != "einsum":  # which multiplies with the gate before
        assert macs["experts.down"] == times * 24
        assert sum(f.macs for f in table.floats) == 0


def test_what_subclasses_multiply_is_counted() -> None:
    x = torch.randn(4, 4)
    table = find_sites(net := Subclasses(), lambda: net(x), 4)
    macs = {layer.name: layer.macs for layer in table.layers}
    assert macs["conv"] == 3 * 2 * 3 and macs["scaled"] == 24 * 5 and macs["adapted"] == 25 and macs["up"] > 0
