"""The network as it is deployed: integer codes instead of weights, constants instead of quantizers, BatchNorm folded.

It is a copy on the CPU; the trained model stays as it is. Without folding it gives the fake-quant model's outputs bit
for bit, with folding up to float rounding.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from hawq_lightning._errors import HawqError, some
from hawq_lightning._float_rest import plain
from hawq_lightning._plan import Plan
from hawq_lightning.export import _operators as operators
from hawq_lightning.export._enabled import check_enabled, quantized_reads_by_name, quantizers_of
from hawq_lightning.export._folding import Folding, fold_batch_norm
from hawq_lightning.export._inventory import readers_by_name, renaming
from hawq_lightning.layers import (
    FakeQuantLayer,
    bake_parametrizations,
    deep_copy,
    holder_of,
    renew_weight,
    results_of,
)
from hawq_lightning.quantization import (
    QuantizedOperand,
    QuantizedResult,
    QuantizedWeight,
    bake_biases,
    plan_of,
    plan_with_copies,
    quantized_layers,
    quantized_operands,
    quantized_results,
    warn_off_grid,
)

Inputs = torch.Tensor | tuple[torch.Tensor, ...]


class DequantizeWeight(nn.Module):
    """Integer codes with one signed scale a channel, in the place of a weight and its quantizer.

    Midrise levels ``(code + 1/2) * scale`` are kept as ``(2 * code + 1) * (scale / 2)``, which is the same number.

    Args:
        codes: integers, the weight's shape.
        scale: float32, one a channel.
        axis: channel axis.
        midrise: code format.
        zero: the code of 0, of affine codes.
    """

    def __init__(self, codes: torch.Tensor, scale: torch.Tensor, axis: int, midrise: bool, zero: int = 0) -> None:
        super().__init__()
        codes, scale = (2 * codes + 1, scale / 2) if midrise else (codes - zero, scale)
        small = bool((codes == codes.to(torch.int8)).all())
        self.register_buffer("codes", codes.to(torch.int8 if small else torch.int16))
        self.register_buffer("scale", scale.clone())
        self.axis = axis
        self.portable = False

    codes: torch.Tensor
    scale: torch.Tensor

    def forward(self, weight: None = None) -> torch.Tensor:
        """The float32 weight."""
        run = operators.dequantize if self.portable else torch.ops.hawq_lightning.dequantize
        return run(self.codes, self.scale, self.axis)


class QuantizeActivation(nn.Module):
    """The grid of an activation as constants.

    Args:
        scale: step.
        zero: the code of 0.
        bits: code width.
    """

    def __init__(self, scale: float, zero: int, bits: int) -> None:
        super().__init__()
        self.scale, self.zero, self.top = scale, zero, (1 << bits) - 1
        self.portable = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The nearest values on the grid; same shape."""
        run = operators.snap if self.portable else torch.ops.hawq_lightning.snap
        return run(x, self.scale, self.zero, self.top)


class FloatOperand(nn.Identity):
    """In the place of a quantizer of attention that was never switched on."""

    bits = 0


@dataclass(frozen=True)
class Deployed:
    """A network ready for export.

    Attributes:
        model: the copy, on the CPU, in evaluation mode.
        plan: the plan that it carries, with the model's own names.
        inputs: example inputs of at least two images.
        folding: which BatchNorm went where, and which stayed and why.
        grids: how many grids an integer file has beside the plan's.
        still_float: products that an integer file computes in float -> why.
        narrowed: weights whose 8-bit codes a file holds by 7 bits.
    """

    model: nn.Module
    plan: Plan
    inputs: tuple[torch.Tensor, ...]
    folding: Folding
    grids: int = 0
    still_float: Mapping[str, str] = field(default_factory=dict)
    narrowed: tuple[str, ...] = ()


def deploy(
    model: nn.Module, plan: Plan | None, example_input: Inputs, *, fold: bool = True, free_batch: bool = True
) -> Deployed:
    """Copy a quantized model into its deployed form.

    Args:
        model: with fake-quant layers, enabled.
        plan: the plan that it carries; ``None`` reads it from the quantizers. A plan of a wrapper around this model
            (``net.`` in front of every name) will do too.
        example_input: float images ``[N, ...]``, or a tuple of the model's positional inputs.
        fold: fold BatchNorm into scales and biases.
        free_batch: the first axis of the example may be doubled.

    Raises:
        HawqError: the model is float, was never enabled, carries another plan, or cannot run on the example.
    """
    if plan is not None and not isinstance(plan, Plan):
        raise HawqError(f"The plan must be a Plan (Plan.load reads a file), not {type(plan).__name__}.")
    model = getattr(model, "_orig_mod", model)
    layers = quantized_reads_by_name(model)
    if not layers:
        raise HawqError("The model is float; call quantize(model, plan) or load_packed(path, model) before the export.")
    if not any(q.bits for m in layers.values() for q in quantizers_of(m)):
        raise HawqError("The model's quantizers were never enabled; call quantize(model, plan) before the export.")
    if scripted := [n for n, m in model.named_modules() if isinstance(m, torch.jit.ScriptModule)]:
        raise HawqError(
            f"{scripted[0] or 'The model'} is TorchScript, which torch.export cannot follow: export without it."
        )
    plan = plan_of(model) if plan is None else _named_for(plan, model)
    if uneven := [s for s in plan.sites if s.code not in ("affine", "midrise")]:
        raise HawqError(
            f"Site {uneven[0].name!r} has a {uneven[0].code}, for which ONNX and torch.export have no type; choose a "
            "quantizer with even steps, such as lsq."
        )
    if learned := [n for n, m in layers.items() if not m.input_quantizer.even_steps]:
        raise HawqError(
            f"Layer {learned[0]!r} reads an activation whose levels are no even steps, for which ONNX and torch.export "
            "have no type; choose a quantizer with even steps, such as lsq."
        )
    plan = plan_with_copies(model, plan)
    check_enabled(layers, plan)
    warn_off_grid({n: x for n, x in layers.items() if isinstance(x, QuantizedWeight)})
    copied = _copy(model)
    inputs = at_least_two(example_input) if free_batch else checked(example_input)
    with torch.no_grad():
        bake_biases(copied)
        stored = quantized_layers(copied)
        for layer in stored.values():
            bake_parametrizations(layer.module)
            _store(layer)
        for operand in (*quantized_operands(copied).values(), *quantized_results(copied).values()):
            _store_operand(operand)
        copied = copied.to("cpu").float().eval().requires_grad_(False)
        try:
            given = copied(*inputs)
        except HawqError:
            raise
        except Exception as error:
            raise HawqError(f"The model does not run on the example input: {first_line(error)}") from error
        if any(map(_is_nan, tree_leaves(given))) and not any(map(_is_nan, tree_leaves(_on_cpu(model)(*inputs)))):
            read = some(_read_by_function(copied, stored, inputs)) or "a layer"
            raise HawqError(
                "The model does not run on the example input without its float weights: a function reads that of "
                f"{read}, which is stored as codes. Leave that layer out (exclude=), or let a forward pass find the "
                "sites."
            )
        folding = fold_batch_norm(copied, inputs) if fold else Folding()
    return Deployed(copied, plan, inputs, folding)


def portable(model: nn.Module) -> nn.Module:
    """Use torch's own operators only, in place: what runs where this package is not installed."""
    for module in model.modules():
        if isinstance(module, (DequantizeWeight, QuantizeActivation)):
            module.portable = True
    return model


def stored_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Name and layer of everything that has stored codes or a stored grid."""
    for name, module in model.named_modules():
        if isinstance(module, FakeQuantLayer):
            yield plain(name), module


def _store(layer: QuantizedWeight) -> None:
    w, a = layer.weight_quantizer, layer.input_quantizer
    bits, scale, zero = a.bits, float(a.scale), round(float(a.zero_point))
    stored: nn.Module = nn.Identity()
    if w.bits:
        midrise = w.code == "midrise"
        zero_of_codes = 0 if midrise else round(float(w.zero_point))
        stored = DequantizeWeight(w.codes(layer.weight), w.scale, w.axis, midrise, zero_of_codes)
        layer.drop_weight()  # it may be tied to something else, which keeps it
    setattr(layer.module, layer.quantizer_attribute, stored)
    reads = QuantizeActivation(scale, zero, bits) if bits else nn.Identity()
    setattr(layer.module, layer.input_quantizer_attribute, reads)


def _store_operand(operand: QuantizedOperand) -> None:
    q = operand.input_quantizer
    holder = results_of(operand.module) if isinstance(operand, QuantizedResult) else holder_of(operand.module)
    assert holder is not None
    on = q.bits > 0
    stored = QuantizeActivation(float(q.scale), round(float(q.zero_point)), q.bits) if on else FloatOperand()
    holder[operand.operand] = stored


def _read_by_function(
    model: nn.Module, layers: Mapping[str, QuantizedWeight], inputs: tuple[torch.Tensor, ...]
) -> list[str]:
    """Layers whose weight reaches the outputs past the layer: the one that is no number while the others are ones."""
    places = {name: layer.holder for name, layer in layers.items()}
    dropped = {n: h.__dict__[a] for n, (h, a) in places.items() if isinstance(h.__dict__.get(a), torch.Tensor)}
    found = []
    for name in dropped:
        for other, nothing in dropped.items():
            holder, attribute = places[other]
            shown = nothing if other == name else nothing.new_ones(()).expand(nothing.shape)
            holder.__dict__[attribute] = shown
        if any(map(_is_nan, tree_leaves(model(*inputs)))):
            found.append(name)
    return found


def _named_for(plan: Plan, model: nn.Module) -> Plan:
    rename = renaming(plan.sites[0].layers[0], list(readers_by_name(model)))

    def renamed(name: str | None) -> str | None:
        return name and rename(name)

    sites = tuple(replace(s, name=rename(s.name), layers=tuple(map(rename, s.layers))) for s in plan.sites)
    layers = tuple(
        replace(x, name=rename(x.name), weight=rename(x.weight), activation=renamed(x.activation), norm=renamed(x.norm))
        for x in plan.layers
    )
    products = tuple(
        replace(x, name=rename(x.name), left=renamed(x.left), right=renamed(x.right)) for x in plan.products
    )
    biases = {rename(n): norm and rename(norm) for n, norm in plan.biases.items()}
    return plan.replace(sites=sites, layers=layers, products=products, biases=biases)


def _is_nan(x: object) -> bool:
    return isinstance(x, torch.Tensor) and x.is_floating_point() and bool(x.isnan().any())


def _on_cpu(model: nn.Module) -> nn.Module:
    return _copy(model).to("cpu").float().eval()


def _copy(model: nn.Module) -> nn.Module:
    # a LightningModule knows its Trainer, which knows the data: none of that belongs to the network
    memo: dict[int, Any] = {}
    for module in model.modules():
        renew_weight(module)  # what a hook made in a forward pass with gradients cannot be copied
    for module in model.modules():
        for name in ("_trainer", "_fabric"):
            if module.__dict__.get(name) is not None:
                memo[id(module.__dict__[name])] = None
    return deep_copy(model, memo)


def at_least_two(example: Inputs) -> tuple[torch.Tensor, ...]:
    """Two images or more: with a single one, tracing would take the batch for a constant."""
    return tuple(x if len(x) > 1 else torch.cat([x, x]) for x in checked(example))


def checked(example: Inputs) -> tuple[torch.Tensor, ...]:
    """Inputs on the CPU, of float32 where they are of real numbers.

    Raises:
        HawqError: they are no tensors.
    """
    inputs = example if isinstance(example, tuple) else (example,)
    for x in inputs:
        if not isinstance(x, torch.Tensor) or x.ndim == 0 or not len(x):
            raise HawqError(
                "The example input must be a tensor [N, ...] or a tuple of such, "
                f"not {type(x).__name__}{'' if not isinstance(x, torch.Tensor) else f' of shape {list(x.shape)}'}."
            )
    return tuple(x.detach().to("cpu", torch.float32) if x.is_floating_point() else x.detach().cpu() for x in inputs)


def first_line(error: BaseException) -> str:
    """Type and first line of an error."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"
