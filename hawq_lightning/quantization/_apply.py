"""Putting quantizers into a model, in place: structure first (off), bits later as state."""

from __future__ import annotations

import torch
from torch import nn

from hawq_lightning._errors import HawqError
from hawq_lightning._patterns import Patterns, as_list
from hawq_lightning._plan import Plan, PlanSite
from hawq_lightning._sites import quantizable_layers
from hawq_lightning._types import Model
from hawq_lightning._values import check_has_values
from hawq_lightning.layers import ResultReader, renew_weight
from hawq_lightning.quantization._attention import (
    QuantizedOperand,
    drop_attention,
    prepare_attention,
    put_attention,
    with_operand,
)
from hawq_lightning.quantization._check_plan import check_plan, operands_of_plan
from hawq_lightning.quantization._enabled import quantized_layers, quantized_reads, quantizers
from hawq_lightning.quantization._fold import norms_to_fold
from hawq_lightning.quantization._modules import QuantizedWeight, to_fake_quantized, to_float, with_quantizers
from hawq_lightning.quantization._registry import QuantizerSpec, quantizer_named
from hawq_lightning.quantization._results import drop_biases, drop_results, put_biases, put_results, with_result


def prepare(
    model: nn.Module,
    include: Patterns = None,
    exclude: Patterns = None,
    quantizer: str | QuantizerSpec | None = None,
    attention: bool = False,
) -> dict[str, QuantizedWeight]:
    """Turn every quantizable layer into its fake-quant class, quantizers off; may be called again.

    Args:
        model: changed in place.
        include: see :func:`hawq_lightning.sites`.
        exclude: the same forms; wins over ``include``.
        quantizer: registered name; ``None``: ``uniform``, and fake-quant layers stay as they are.
        attention: also give modules whose forward makes attention quantizers for what that reads.

    Returns:
        layer name -> weight with its quantizers.

    Raises:
        HawqError: no such quantizer, or a pattern that matches no layer.
    """
    include, exclude = as_list(include, "include"), as_list(exclude, "exclude")
    readers = quantizable_layers(model, include, exclude)[0]
    for reader in readers.values():
        to_fake_quantized(reader.module, quantizer)
    if attention:
        prepare_attention(model, include, exclude, quantizer)
    return {name: with_quantizers(reader) for name, reader in readers.items()}


def unquantize(model: Model) -> Model:
    """Plain layers again, with the float weights that they hold.

    Args:
        model: with fake-quant layers; changed in place.

    Returns:
        ``model``.
    """
    for layer in quantized_layers(model).values():
        to_float(layer.module)
    drop_attention(model)
    drop_results(model)
    return model


@torch.no_grad()
def enable(model: nn.Module, plan: Plan) -> None:
    """Fill the quantizers' buffers from a plan; weight steps are fitted to the present weights.

    Layers that the plan leaves out stay float. Parameters are untouched.

    Raises:
        HawqError: the plan is for another model, or a weight holds NaN.
    """
    check_plan(model, plan)
    plan = plan.reconciled()
    planned = {name for s in plan.sites for name in s.layers}
    # planned layers only: a layer that was left out gets no buffers, so that checkpoints fit a new model
    spec = quantizer_named(plan.quantizer, plan.quantizer_options)
    layers: dict[str, QuantizedWeight | QuantizedOperand] = {}
    for name, weight in quantizable_layers(model)[0].items():
        if name in planned:
            to_fake_quantized(weight.module, spec)
            layers[name] = with_quantizers(weight)
    results: list[ResultReader] = []
    for name, operand in operands_of_plan(model, plan).items():
        if isinstance(operand, ResultReader):
            results.append(operand)
        else:
            put_attention(operand.module, spec)
            layers[name] = with_operand(operand)
    put_results(model, results, spec)
    layers |= {x.name: with_result(x) for x in results}
    norms = norms_to_fold(model, plan.layers)
    disable(model)
    try:
        for s in plan.sites:
            for name in s.layers:
                enable_site(layers[name], s, norms.get(name))
        tie_scales(model, plan)
    except HawqError:
        disable(model)  # all or nothing
        raise
    put_biases(model, plan.biases)


def tie_scales(model: nn.Module, plan: Plan) -> None:
    """Let the layers of one site have one grid, where training moves grids, and weights know the BatchNorm behind."""
    reads, layers = quantized_reads(model), quantized_layers(model)
    for s in plan.sites:
        first, *others = (reads[name].quantizer_of(s.kind) for name in s.layers if name in reads)
        for quantizer in others:
            if quantizer.has_dynamic_range and quantizer is not first and type(quantizer) is type(first):
                quantizer.tie_to(first)
    for name, norm in norms_to_fold(model, plan.layers).items():
        if name in layers and layers[name].weight_quantizer.bits:
            layers[name].weight_quantizer.fold(norm)


@torch.no_grad()
def enable_site(layer: QuantizedWeight | QuantizedOperand, site: PlanSite, norm: nn.Module | None = None) -> None:
    """Switch on one quantizer of one layer; ``norm`` is the BatchNorm that it can take in."""
    if site.kind == "activation":
        assert site.scale is not None and site.zero_point is not None
        layer.input_quantizer.enable(site.bits, site.scale, site.zero_point)
        return
    assert isinstance(layer, QuantizedWeight)
    layer.weight_quantizer.fold(norm)
    renew_weight(layer.module)
    try:
        layer.weight_quantizer.fit(layer.weight, site.bits, site.code)
    except HawqError as error:
        raise HawqError(f"Layer {site.layers[0]!r}: {error}.") from None


@torch.no_grad()
def reestimate(model: nn.Module, step: int) -> None:
    """Fit ranges anew where ``reestimate`` divides ``step``, as the callbacks do by themselves.

    Args:
        model: with quantizers enabled.
        step: optimizer steps so far.
    """
    for layer in quantized_layers(model).values():
        q = layer.weight_quantizer
        if q.bits and q.range_updates_enabled and q.reestimate and step and step % q.reestimate == 0:
            renew_weight(layer.module)
            q.fit(layer.weight, q.bits, q.code)


def disable(model: nn.Module) -> None:
    """Switch every quantizer off."""
    for quantizer in quantizers(model):
        quantizer.disable()
    drop_biases(model)


def quantize(model: Model, plan: Plan) -> Model:
    """Enable a plan's quantizers in place; the same Parameters and state-dict names, plus the quantizers' buffers.

    Args:
        model: a float model, or one already quantized.
        plan: from :func:`hawq_lightning.select`, the callback, or a file.

    Returns:
        the model itself.

    Raises:
        HawqError: the plan was made for another model, or the model is on the meta device.
    """
    check_has_values(model, "quantize")
    enable(model, plan)
    return model
