"""What quantizers a model has, and what they hold: bits, the plan that they carry, and the float model for a while."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain

from torch import nn

from hawq_lightning._errors import HawqError
from hawq_lightning._plan import Plan, PlanSite
from hawq_lightning._sites import quantizable_layers, site_name
from hawq_lightning.layers import FakeQuantLayer
from hawq_lightning.quantization._attention import QuantizedOperand, quantized_operands
from hawq_lightning.quantization._modules import QuantizedWeight, with_quantizers
from hawq_lightning.quantization._quantizer import Quantizer
from hawq_lightning.quantization._quantizers import ActivationQuantizer
from hawq_lightning.quantization._results import biases_of, quantized_results


def quantized_layers(model: nn.Module) -> dict[str, QuantizedWeight]:
    """Layer name -> weight, of the model's fake-quant layers."""
    readers = quantizable_layers(model)[0]
    return {n: with_quantizers(x) for n, x in readers.items() if isinstance(x.module, FakeQuantLayer)}


def quantized_reads(model: nn.Module) -> dict[str, QuantizedWeight | QuantizedOperand]:
    """Name -> what stands where plans name layers: weights of fake-quant layers, operands of attention, results."""
    return {**quantized_layers(model), **quantized_operands(model), **quantized_results(model)}


def quantizers(model: nn.Module) -> list[Quantizer]:
    """All quantizers of the model."""
    return [m for m in model.modules() if isinstance(m, Quantizer)]


def enabled_bits(model: nn.Module) -> dict[str, int]:
    """``<layer>.<parameter>`` and ``<layer>.input`` -> bits, for quantizers that are on."""
    out: dict[str, int] = {}
    for name, layer in quantized_layers(model).items():
        parts: Mapping[str, Quantizer] = {layer.site: layer.weight_quantizer}
        if layer.read.reads_activation:
            parts = {**parts, site_name(name, "input"): layer.input_quantizer}
        out |= {part: q.bits for part, q in parts.items() if q.bits}
    operands = quantized_operands(model).items()
    out |= {site_name(n, "input"): q.bits for n, x in operands if (q := x.input_quantizer).bits}
    return out | {n: q.bits for n, x in quantized_results(model).items() if (q := x.input_quantizer).bits}


def plan_of(model: nn.Module) -> Plan:
    """The plan that a model's enabled quantizers carry: bits, codes and scales without their history.

    Raises:
        HawqError: no quantizer is on.
    """
    sites: dict[str, list[PlanSite]] = {"weight": [], "activation": []}
    layers = quantized_layers(model)
    users: dict[int, list[str]] = {}
    for name, layer in layers.items():
        if layer.weight_quantizer.bits:
            users.setdefault(layer.key, []).append(name)
    for name, layer in layers.items():
        w, a = layer.weight_quantizer, layer.input_quantizer
        shape = tuple(layer.weight.shape)
        sharing = tuple(users.get(layer.key, ()))
        if w.bits and sharing[0] == name:
            sites["weight"].append(PlanSite(layer.site, "weight", sharing, shape, layer.weight.numel(), w.bits, w.code))
        if a.bits and layer.read.reads_activation:
            sites["activation"].append(_activation_site(name, a))
    operands: dict[str, QuantizedOperand] = quantized_operands(model)
    sites["activation"] += [_activation_site(n, q) for n, x in operands.items() if (q := x.input_quantizer).bits]
    results = quantized_results(model)
    sites["activation"] += [_activation_site(n, q, n) for n, x in results.items() if (q := x.input_quantizer).bits]
    if not sites["weight"] and not sites["activation"]:
        raise HawqError("No quantizer of this model is enabled.")
    on = (x.spec for x in layers.values() if x.weight_quantizer.bits or x.input_quantizer.bits)
    spec = next(chain(on, (x.spec for x in (*operands.values(), *results.values()))))
    return Plan(
        sites=(*sites["weight"], *sites["activation"]), selector="restored", quantizer=spec.name,
        quantizer_options=dict(spec.options), biases=biases_of(model),
    )  # fmt: skip


def _activation_site(name: str, quantizer: ActivationQuantizer, site: str = "") -> PlanSite:
    scale, zero_point = float(quantizer.scale), round(float(quantizer.zero_point))
    site = site or site_name(name, "input")
    return PlanSite(site, "activation", (name,), (), 0, quantizer.bits, quantizer.code, scale, zero_point)


@contextmanager
def fake_quant_disabled(model: nn.Module) -> Iterator[None]:
    """The float model for a while: every quantizer is the identity inside."""
    with identities(quantizers(model)):
        yield


@contextmanager
def identities(these: Iterable[Quantizer]) -> Iterator[None]:
    """Some quantizers are the identity inside."""
    enabled = [q for q in these if not q.fake_quant_disabled]
    for quantizer in enabled:
        quantizer.fake_quant_disabled = True
    try:
        yield
    finally:
        for quantizer in enabled:
            quantizer.fake_quant_disabled = False


def refresh(model: nn.Module) -> None:
    """Bring Python mirrors in line with buffers, after something wrote to the buffers behind our back."""
    for quantizer in quantizers(model):
        quantizer.refresh()
