"""Putting quantizers into a model, in place: structure first (off), bits later as state."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain

import torch
from torch import nn

from hawq_lightning._attention_calls import attention_operands, results_named
from hawq_lightning._errors import HawqError, nearest
from hawq_lightning._patterns import Patterns
from hawq_lightning._plan import Plan, PlanSite
from hawq_lightning._site_table import Site
from hawq_lightning._sites import quantizable_layers, site_name
from hawq_lightning._types import Model
from hawq_lightning._values import check_has_values
from hawq_lightning.layers import (
    FakeQuantLayer,
    OperandReader,
    ResultReader,
    WeightReader,
    renew_weight,
    split_operand,
)
from hawq_lightning.quantization._attention import (
    QuantizedOperand,
    drop_attention,
    prepare_attention,
    put_attention,
    quantized_operands,
    with_operand,
)
from hawq_lightning.quantization._fold import norms_to_fold
from hawq_lightning.quantization._modules import QuantizedWeight, to_fake_quantized, to_float, with_quantizers
from hawq_lightning.quantization._quantizer import Quantizer
from hawq_lightning.quantization._quantizers import ActivationQuantizer
from hawq_lightning.quantization._registry import QuantizerSpec, quantizer_named
from hawq_lightning.quantization._results import (
    biases_of,
    drop_biases,
    drop_results,
    put_biases,
    put_results,
    quantized_results,
    with_result,
)


def quantized_layers(model: nn.Module) -> dict[str, QuantizedWeight]:
    """Layer name -> weight, of the model's fake-quant layers."""
    readers = quantizable_layers(model)[0]
    return {n: with_quantizers(x) for n, x in readers.items() if isinstance(x.module, FakeQuantLayer)}


def quantized_reads(model: nn.Module) -> dict[str, QuantizedWeight | QuantizedOperand]:
    """Name -> what stands where plans name layers: weights of fake-quant layers, operands of attention, results."""
    return {**quantized_layers(model), **quantized_operands(model), **quantized_results(model)}


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


def check_plan(model: nn.Module, plan: Plan) -> None:
    """Compare a plan with the layers of a model.

    Raises:
        HawqError: it was made for another model (says which sites differ), a code format that its quantizer lacks, or
            an activation without a grid for its bits.
    """
    weights_of, _ = quantizable_layers(model)
    layers: dict[str, WeightReader | OperandReader] = {**weights_of, **_operands_of(model, plan)}
    have: dict[str, Site] = {}
    for s in plan.sites:
        names = [n for n in s.layers if n in layers]
        if len(names) == len(s.layers) and s.layers:
            shape = tuple(weights_of[s.layers[0]].weight.shape) if s.kind == "weight" else s.shape
            have[s.name] = Site(s.name, s.kind, s.layers, shape, s.numel)
    if len(have) != len(plan.sites):
        planned = {n for s in plan.sites for n in s.layers}
        for name in sorted(set(weights_of) - planned):
            reader = weights_of[name]
            have[reader.site] = Site(reader.site, "weight", (name,), tuple(reader.weight.shape), 0)
    plan.check_fits(have)
    if missing := [(s.name, n) for s in plan.sites for n in s.layers if n not in layers]:
        name, layer = missing[0]
        raise HawqError(
            f"Site {name!r} of the plan names a layer {layer!r} that the model lacks.{nearest(layer, layers)}"
        )
    spec = quantizer_named(plan.quantizer, plan.quantizer_options)
    weights, of_activations = spec.weight_quantizer(1), spec.activation_quantizer().code
    for s in plan.reconciled().sites:
        formats = weights.code_formats(s.bits) if s.kind == "weight" else (of_activations,)
        if s.code not in formats:
            raise HawqError(
                f"Site {s.name!r} of the plan has code format {s.code!r}; {s.kind}s of {s.bits} bits can be "
                f"{' or '.join(map(repr, formats))} with quantizer {plan.quantizer!r}."
            )
        if s.kind == "weight":
            continue
        if s.scale is None or s.zero_point is None:
            raise HawqError(
                f"Site {s.name!r} of the plan has no scale and zero_point; activations need calibrated ones."
            )
        if not 0 <= s.zero_point < 1 << s.bits:
            raise HawqError(
                f"Site {s.name!r} of the plan has zero_point {s.zero_point}, which {s.bits} bits cannot hold "
                f"(0 to {(1 << s.bits) - 1})."
            )


def with_quantizer(plan: Plan, quantizer: QuantizerSpec) -> Plan:
    """The same bits for another quantizer: code formats that it has, and no Omega where its error is another one."""
    if (plan.quantizer, dict(plan.quantizer_options)) == (quantizer.name, dict(quantizer.options)):
        return plan
    weights, of_activations = quantizer.weight_quantizer(1), quantizer.activation_quantizer().code
    old = quantizer_named(plan.quantizer, plan.quantizer_options).weight_quantizer(1)
    alike = type(weights).fit is type(old).fit and weights.ranges == old.ranges

    def moved(site: PlanSite) -> PlanSite:
        if site.kind == "activation":
            return site if site.code == of_activations else replace(site, code=of_activations, omega=None, options=())
        formats = weights.code_formats(site.bits)
        code = site.code if site.code in formats else formats[0]
        if alike and code == site.code:
            return site
        return replace(site, code=code, omega=None, perturbation=None, options=())

    sites = tuple(moved(s) for s in plan.reconciled().sites)
    return plan.replace(sites=sites, quantizer=quantizer.name, quantizer_options=dict(quantizer.options))


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
    for name, operand in _operands_of(model, plan).items():
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


def _operands_of(model: nn.Module, plan: Plan) -> dict[str, OperandReader]:
    every = dict.fromkeys(n for s in plan.sites for n in s.layers)
    names = {n for n in every if split_operand(n)}
    operands = {n: x for n, x in attention_operands(model).items() if n in names} if names else {}
    return {**operands, **results_named(model, every)}


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


def quantizers(model: nn.Module) -> list[Quantizer]:
    """All quantizers of the model."""
    return [m for m in model.modules() if isinstance(m, Quantizer)]


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
