"""Whether a model's quantizers are those of a plan."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from hawq_lightning._errors import HawqError
from hawq_lightning._plan import Plan
from hawq_lightning.export._inventory import operands_by_name, readers_by_name
from hawq_lightning.layers import FakeQuantLayer, holder_of
from hawq_lightning.quantization import (
    ActivationQuantizer,
    QuantizedOperand,
    QuantizedWeight,
    Quantizer,
    WeightQuantizer,
    quantized_results,
    with_operand,
    with_quantizers,
)


def quantized_reads_by_name(model: nn.Module) -> dict[str, QuantizedWeight | QuantizedOperand]:
    """What stands where plans name layers, under all names: weights, operands of attention, results."""
    operands = {n: with_operand(x) for n, x in operands_by_name(model).items() if holder_of(x.module) is not None}
    return {**quantized_by_name(model), **operands, **quantized_results(model)}


def quantized_by_name(model: nn.Module) -> dict[str, QuantizedWeight]:
    """The weights of fake-quant layers, under all names of their layers."""
    readers = readers_by_name(model)
    return {n: with_quantizers(x) for n, x in readers.items() if isinstance(x.module, FakeQuantLayer)}


def check_enabled(layers: Mapping[str, QuantizedWeight | QuantizedOperand], plan: Plan) -> None:
    """Raise HawqError, naming the site, unless these layers carry exactly ``plan``."""
    planned: set[int] = set()
    for site in plan.reconciled().sites:
        for name in site.layers:
            if name not in layers:
                raise HawqError(f"The model is not quantized at {name!r}: call quantize(model, plan) first.")
            quantizer = layers[name].quantizer_of(site.kind)
            planned.add(id(quantizer))
            quantizer.refresh()
            reads = layers[site.layers[0]].input_quantizer
            if site.kind == "activation" and float(quantizer.scale) != float(reads.scale):
                raise HawqError(
                    f"The layers of {site.name!r} read one tensor by different grids, {site.layers[0]!r} and {name!r}; "
                    "call hawq_lightning.quantization.tie_scales(model, plan) before training goes on."
                )
            if quantizer.bits == 0:
                raise HawqError(f"The quantizer of {site.name!r} was never enabled: call quantize(model, plan) first.")
            assert isinstance(quantizer, (WeightQuantizer, ActivationQuantizer))
            code = quantizer.code
            if quantizer.bits != site.bits or code != site.code:
                raise HawqError(
                    f"The model carries another plan: {site.name!r} has {quantizer.bits} bits ({code}), "
                    f"the plan says {site.bits} ({site.code})."
                )
    for name, layer in layers.items():
        for quantizer in quantizers_of(layer):
            if quantizer.bits and id(quantizer) not in planned:
                raise HawqError(
                    f"The model carries another plan: {name!r} has an enabled quantizer that the plan has not."
                )


def quantizers_of(layer: QuantizedWeight | QuantizedOperand) -> tuple[Quantizer, ...]:
    """Of a weight and what it is multiplied with, or of what attention reads."""
    if isinstance(layer, QuantizedWeight):
        return layer.weight_quantizer, layer.input_quantizer
    return (layer.input_quantizer,)
