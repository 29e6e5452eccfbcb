"""Adapters as peft has them: base and adapters are sites, adapters alone are trained, DoRA's base stays float."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from hawq_lightning import load_packed, quantize, save_packed, sites
from hawq_lightning.export import to_program
from hawq_lightning.quantization import enabled_bits
from tests.layer_checks import plan_for

Batch = tuple[torch.Tensor, torch.Tensor]


class Lora(nn.Module):
    """A frozen layer, and a product of two small ones beside it."""

    def __init__(self, base: nn.Linear, dropout: float = 0.0) -> None:
        super().__init__()
        self.base_layer = base.requires_grad_(False)
        self.lora_A = nn.ModuleDict({"default": nn.Linear(base.in_features, 2, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(2, base.out_features, bias=False)})
        self.lora_dropout = nn.ModuleDict({"default": nn.Dropout(dropout)})

    def forward(self, x: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        """With the adapter."""
        a, b = self.lora_A["default"], self.lora_B["default"]
        y: torch.Tensor = self.base_layer(x) + b(a(self.lora_dropout["default"](x))) * 0.5
        return y


class Dora(Lora):
    """The same, normalised by columns: a function reads the frozen weight, and the adapter an identity matrix."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__(base)
        self.magnitude = nn.Parameter(base.weight.norm(dim=1).detach().clone())

    def forward(self, x: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        """With the adapter."""
        a, b, base = self.lora_A["default"], self.lora_B["default"], self.base_layer
        eye = torch.eye(a.weight.shape[1], device=a.weight.device, dtype=x.dtype)
        scale = self.magnitude / (base.weight + 0.5 * b(a(eye)).T).norm(dim=1).detach()
        return F.linear(x, base.weight, base.bias) * scale + 0.5 * b(a(x)) * scale


class Wrapper(nn.Module):
    """As a library wraps a network."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        layer, head = nn.Linear(6, 8), nn.Linear(8, 3)
        adapted = Dora(layer) if kind == "dora" else Lora(layer, 0.1 if kind == "dropout" else 0.0)
        self.net = nn.Sequential(
            adapted, nn.ReLU(), head.requires_grad_(kind != "lora") if kind != "two" else Lora(head)
        )

    def forward(self, *args: torch.Tensor) -> torch.Tensor:
        """Whatever the network takes."""
        y: torch.Tensor = self.net(*args)
        return y


def _loss(model: nn.Module, batch: Batch) -> torch.Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


@pytest.mark.parametrize("kind", ["lora", "two", "dropout", "dora"])
def test_base_and_adapters_are_sites_trained_packed_and_exported(kind: str, tmp_path: Path) -> None:
    net, batch = Wrapper(kind).eval(), (torch.randn(4, 6), torch.arange(4) % 3)
    table = sites(net, batch[0])
    layers = {x.name.removeprefix("net.") for x in table.layers}
    assert {"0.lora_A.default", "0.lora_B.default"} <= layers
    if kind == "dora":
        reasons = {f.name: f.reason for f in table.floats}
        assert "0.base_layer" not in layers and "a function reads its weight" in reasons["net.0.base_layer"]
    else:
        assert "0.base_layer" in layers
        shared = next(x.activation for x in table.layers if x.name == "net.0.base_layer")
        assert shared == next(x.activation for x in table.layers if x.name == "net.0.lora_A.default")
    plan = plan_for(net, batch, _loss)
    quantize(net, plan)
    want = net(batch[0])
    save_packed(net, plan, tmp_path / "net")
    again = load_packed(tmp_path / "net", Wrapper(kind).eval())
    assert torch.equal(again(batch[0]), want) and enabled_bits(again) == enabled_bits(net)
    program = to_program(net, plan, batch[0])
    assert torch.allclose(program.module()(batch[0]), want, atol=1e-5)
    _loss(net.train(), batch).backward()
    trained = {n for n, p in net.named_parameters() if p.grad is not None}
    assert trained == {n for n, p in net.named_parameters() if p.requires_grad} and len(trained) >= 2
