"""A layer that reads one weight: what a weight site is made of.

A weight site is a parameter and its reads. Most layers read one parameter, ``weight``; a layer may read several, or one
that another module holds, or by a function in the place of a module's call: its kind says so.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from hawq_lightning.layers._computed import put_computed
from hawq_lightning.layers._fake_quant import input_quantizer_attribute, layer_type, quantizer_attribute
from hawq_lightning.layers._kind import LayerKind, Record, WeightRead, kind_of, weight_of


@dataclass(frozen=True, eq=False)
class WeightReader:
    """One module reading one of its parameters.

    Attributes:
        name: of the layer, in plans and tables.
        site: ``<module>.<parameter>``: the name of the weight site, if no layer before it reads the same weight.
        module: float or fake-quant.
        parameter: dotted name of the weight in the module.
        read: how it is read.
    """

    name: str
    site: str
    module: nn.Module
    parameter: str
    read: WeightRead

    @property
    def kind(self) -> LayerKind:
        """Of the layer."""
        return kind_of(self.module)

    @property
    def type_name(self) -> str:
        """Class name of the float layer, or of the one that it is a subclass of."""
        return getattr(self.kind, "float_type", layer_type(self.module)).__name__

    @property
    def weight(self) -> torch.Tensor:
        """The float weight, as it is now."""
        return weight_of(self.module, self.parameter)

    @property
    def recomputed(self) -> bool:
        """Whether a hook or a parametrization computes the weight (weight norm, pruning): it is no parameter."""
        holder, name = self.holder
        return name not in holder._parameters

    @property
    def channel_axis(self) -> int:
        """Axis of the weight that gets one scale an index."""
        return self.read.channel_axis

    @property
    def prefix(self) -> str:
        """What the names of the module's parameters begin with, in the model."""
        return self.site.removesuffix(self.parameter)

    def macs(self, x: torch.Tensor, output: torch.Tensor) -> int:
        """Multiply-accumulates of one call."""
        return self.kind.macs(self.module, self.parameter, x, output)

    def on_read(self, visit: Callable[[torch.Tensor], torch.Tensor]) -> RemovableHandle:
        """Before each call show the tensor that the weight will be multiplied with; ``visit`` may return another."""
        return self.kind.on_read(self.module, self.parameter, visit)

    def on_call(self, record: Record) -> RemovableHandle:
        """After each call show what was read and the product; ``record`` may return another product."""
        return self.kind.on_call(self.module, self.parameter, record)

    @property
    def holder(self) -> tuple[nn.Module, str]:
        """The module whose own parameter the weight is, and its name there."""
        holder, _, name = self.parameter.rpartition(".")
        return self.module.get_submodule(holder), name

    @property
    def key(self) -> int:
        """What stands for the weight: the parameter, or the layer where it is computed anew for each call."""
        return id(self.module) if self.recomputed else id(self.weight)

    def put_weight(self, weight: torch.Tensor) -> Callable[[], None]:
        """Put a tensor in the place of a :attr:`recomputed` weight, until what is returned is called or a hook runs."""
        return put_computed(*self.holder, weight)

    def set_weight(self, weight: nn.Parameter | None) -> None:
        """Put another parameter in the place of the weight, here alone."""
        holder, name = self.holder
        setattr(holder, name, weight)

    def drop_weight(self) -> None:
        """Free the weight, here alone: codes have taken its place.

        What asks for its type, shape or device (``torch.eye(8, device=self.proj.weight.device)``) is answered by a
        tensor that takes the memory of one number, which is none: what reads it after all gives NaN.
        """
        holder, name = self.holder
        if not self.kind.known_by_tensor:
            weight = self.weight.detach()
            nothing = weight.new_full((1,) * weight.ndim, math.nan).expand(weight.shape)
            setattr(holder, name, None)
            holder.__dict__[name] = nothing
            return
        del holder._parameters[name]
        setattr(holder, name, torch.empty(0))

    @property
    def quantizer_attribute(self) -> str:
        """Name of the weight's quantizer in the fake-quant layer."""
        return quantizer_attribute(self.parameter)

    @property
    def input_quantizer_attribute(self) -> str:
        """Name of the quantizer of what the weight is multiplied with."""
        return input_quantizer_attribute(self.parameter)


def as_reader(layer: nn.Module | WeightReader) -> WeightReader:
    """A layer's reader; the module itself will do where it reads a single weight."""
    return layer if isinstance(layer, WeightReader) else next(iter(readers_of("", layer).values()))


def readers_of(name: str, module: nn.Module) -> dict[str, WeightReader]:
    """Layer name -> reader, for every weight that a layer reads.

    Args:
        name: the module's; the layer's name if it reads a single weight, else ``<name>.<parameter>`` for each.
        module: of a registered kind.
    """
    weights = kind_of(module).weights(module)
    readers = {}
    for parameter, read in weights.items():
        site = f"{name}.{parameter}" if name else parameter
        layer = name if len(weights) == 1 else site
        readers[layer] = WeightReader(layer, site, module, parameter, read)
    return readers
