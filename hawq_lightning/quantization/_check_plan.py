"""Whether a plan fits a model, and the same plan for another quantizer; what its names stand for."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from hawq_lightning._attention_calls import attention_operands, results_named
from hawq_lightning._errors import HawqError, nearest
from hawq_lightning._plan import Plan, PlanSite
from hawq_lightning._site_table import Site
from hawq_lightning._sites import quantizable_layers
from hawq_lightning.layers import OperandReader, WeightReader, split_operand
from hawq_lightning.quantization._registry import QuantizerSpec, quantizer_named


def check_plan(model: nn.Module, plan: Plan) -> None:
    """Compare a plan with the layers of a model.

    Raises:
        HawqError: it was made for another model (says which sites differ), a code format that its quantizer lacks, or
            an activation without a grid for its bits.
    """
    weights_of, _ = quantizable_layers(model)
    layers: dict[str, WeightReader | OperandReader] = {**weights_of, **operands_of_plan(model, plan)}
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


def operands_of_plan(model: nn.Module, plan: Plan) -> dict[str, OperandReader]:
    every = dict.fromkeys(n for s in plan.sites for n in s.layers)
    names = {n for n in every if split_operand(n)}
    operands = {n: x for n, x in attention_operands(model).items() if n in names} if names else {}
    return {**operands, **results_named(model, every)}
