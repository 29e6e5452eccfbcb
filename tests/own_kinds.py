"""Kinds of layers as users write them: 3-D weights, several weights, weights of a child, products by functions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn import functional as F

from hawq_lightning.layers import FakeQuantLayer, LayerCall, LayerKind, WeightRead, register_layer, weight_of


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

    def weights(self, module: nn.Module) -> Mapping[str, WeightRead]:
        return {"weight": WeightRead(channel_axis=1)}

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
    inner = _shown(module, "up", x, product)
    return _shown(module, "holder.down", inner.relu(), product)


def _shown(module: nn.Module, parameter: str, x: torch.Tensor, product: Any) -> torch.Tensor:
    """One product, between the hooks of :class:`PairKind`."""
    shown: dict[str, list[Any]] = PairKind.shown.get(id(module), {})
    for visit in shown.get(f"read {parameter}", []):
        x = visit(x)
    weight = weight_of(module, parameter)
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


class Gate(nn.Module):
    """Two weights that are multiplied with one tensor: ``(U x) * sigmoid(V x)``."""

    def __init__(self) -> None:
        super().__init__()
        self.value, self.gate = nn.Parameter(torch.randn(5, 3)), nn.Parameter(torch.randn(5, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _gated(self, x, F.linear)


def _gated(module: Gate, x: torch.Tensor, product: Any) -> torch.Tensor:
    return _shown(module, "value", x, product) * _shown(module, "gate", x, product).sigmoid()


class QGate(FakeQuantLayer, Gate):
    float_type = Gate

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _gated(self, x, lambda p, x, w: self.quantized_product(F.linear, x, w, parameter=p))


@register_layer("gate_of_a_test")
class GateKind(PairKind):
    float_type, fake_quant_type = Gate, QGate

    def weights(self, module: nn.Module) -> Mapping[str, WeightRead]:
        return {"value": WeightRead(0), "gate": WeightRead(0)}


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.head = Gate(), nn.Linear(5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.gate(x))


class Paired(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.pair, self.head = Pair(), nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.pair(x).relu())
