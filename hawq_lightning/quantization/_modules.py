"""Layers into fake-quant layers and back, in place; and the weights of such layers, each with its quantizers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeAlias, cast

import torch
from torch import nn

from hawq_lightning.layers import (
    BIAS,
    HOLDER,
    RESULTS,
    FakeQuantLayer,
    WeightReader,
    fake_quant_class,
    hold_forward,
    input_quantizer_attribute,
    kind_of,
    layer_type,
    must_be_called,
    quantizer_attribute,
    release_forward,
    weight_of,
)
from hawq_lightning.quantization._quantizer import Quantizer
from hawq_lightning.quantization._quantizers import ActivationQuantizer, WeightQuantizer
from hawq_lightning.quantization._registry import QuantizerSpec, quantizer_named

QuantizedLayer: TypeAlias = FakeQuantLayer[WeightQuantizer, ActivationQuantizer]


class QuantizedWeight(WeightReader):
    """A weight of a fake-quant layer, with its quantizer and that of what it is multiplied with."""

    @property
    def weight_quantizer(self) -> WeightQuantizer:
        """Of the weight."""
        return cast(WeightQuantizer, getattr(self.module, self.quantizer_attribute))

    @property
    def input_quantizer(self) -> ActivationQuantizer:
        """Of what the weight is multiplied with; it stays off where that is no activation."""
        return cast(ActivationQuantizer, getattr(self.module, self.input_quantizer_attribute))

    def quantizer_of(self, kind: str) -> Quantizer:
        """That of the ``weight``, or of the ``activation`` that it is multiplied with."""
        return self.weight_quantizer if kind == "weight" else self.input_quantizer

    @property
    def quantized_weight(self) -> torch.Tensor:
        """The weight as the forward pass uses it."""
        return cast(torch.Tensor, self.weight_quantizer(self.weight))

    @property
    def spec(self) -> QuantizerSpec:
        """The quantizer with its options."""
        return spec_of(cast(QuantizedLayer, self.module))


def with_quantizers(reader: WeightReader) -> QuantizedWeight:
    """The same weight of a layer that is a fake-quant layer by now."""
    return QuantizedWeight(reader.name, reader.site, reader.module, reader.parameter, reader.read)


def quantizers_in(layer: nn.Module) -> dict[str, Quantizer]:
    """A fake-quant layer's quantizers by attribute, in the order of registration."""
    return {name: m for name, m in layer._modules.items() if isinstance(m, Quantizer)}


def spec_of(layer: QuantizedLayer) -> QuantizerSpec:
    """The quantizer of a fake-quant layer, with its options."""
    name = next(q.name for q in quantizers_in(layer).values() if isinstance(q, WeightQuantizer))
    return quantizer_named(name, layer.quantizer_options)


def to_fake_quantized(layer: nn.Module, quantizer: str | QuantizerSpec | None = None) -> QuantizedLayer:
    """Turn a layer into its fake-quant class in place, quantizers off.

    Args:
        layer: of a registered kind, or a fake-quant layer, which stays as it is unless it has another quantizer.
        quantizer: registered name; ``None``: a fake-quant layer's own, ``uniform`` for a float layer. A layer that has
            it with other options gets new quantizers with the old ones' state.
    """
    if isinstance(layer, FakeQuantLayer):
        spec = spec_of(layer) if quantizer is None else quantizer_named(quantizer)
        if spec_of(layer).name == spec.name:
            if layer.quantizer_options != dict(spec.options):
                replaced = quantizers_in(layer)
                _put_quantizers(layer, spec, _new_quantizers(layer, spec))
                for name, new in quantizers_in(layer).items():
                    new.load_state_dict(replaced[name].state_dict())
                    new._parameters.update(replaced[name]._parameters)  # an optimizer may know them
            return layer
        to_float(layer)
    spec = quantizer_named(quantizer or "uniform")
    made = _new_quantizers(layer, spec)  # first, since memory may run out here: a layer is never half of one
    made_class = fake_quant_class(type(layer), kind_of(layer).fake_quant_type)
    hold_forward(layer)
    layer.__class__ = made_class
    assert isinstance(layer, FakeQuantLayer)
    layer.register_forward_pre_hook(must_be_called)
    _put_quantizers(layer, spec, made)
    return layer


def _new_quantizers(layer: nn.Module, spec: QuantizerSpec) -> dict[str, Quantizer]:
    """Quantizers for a layer by attribute, switched off: of its weights, then of what these are multiplied with."""
    made: dict[str, Quantizer] = {}
    weights = {p: (weight_of(layer, p), read) for p, read in kind_of(layer).weights(layer).items()}
    for parameter, (weight, read) in weights.items():
        quantizer = spec.weight_quantizer(weight.shape[read.channel_axis], read.channel_axis).to(weight.device)
        made[quantizer_attribute(parameter)] = quantizer
    for parameter, (weight, _) in weights.items():
        made[input_quantizer_attribute(parameter)] = spec.activation_quantizer().to(weight.device)
    return made


def _put_quantizers(layer: QuantizedLayer, spec: QuantizerSpec, made: dict[str, Quantizer]) -> None:
    for attribute, quantizer in made.items():
        setattr(layer, attribute, quantizer)
    layer.quantizer_options = dict(spec.options)
    for q in quantizers_in(layer).values():
        q.train(layer.training)


def to_float(layer: nn.Module) -> nn.Module:
    """Undo :func:`to_fake_quantized`: the plain layer again, with the weights that it holds."""
    if isinstance(layer, FakeQuantLayer):
        for name in quantizers_in(layer):
            delattr(layer, name)
        del layer.quantizer_options
        for key in [k for k, hook in layer._forward_pre_hooks.items() if hook is must_be_called]:
            del layer._forward_pre_hooks[key]
        layer.__class__ = layer.float_type  # type: ignore[assignment]
        release_forward(layer)
    return layer


@contextmanager
def float_classes(model: nn.Module) -> Iterator[None]:
    """The float network for a while, in classes and children as well: what code sees that asks for exact types."""
    held = {HOLDER, RESULTS, BIAS}
    layers = [m for m in model.modules() if isinstance(m, FakeQuantLayer) or not held.isdisjoint(m._modules)]
    kept = [(layer, type(layer), layer._modules) for layer in layers]
    try:
        for layer in layers:
            hidden = {*quantizers_in(layer), *held}
            layer.__dict__["_modules"] = {k: m for k, m in layer._modules.items() if k not in hidden}
            layer.__class__ = layer_type(layer)
            release_forward(layer)
        yield
    finally:
        for layer, made, modules in kept:
            hold_forward(layer)
            layer.__class__ = made
            layer.__dict__["_modules"] = modules
