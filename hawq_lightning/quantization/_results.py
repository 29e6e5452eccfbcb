"""Quantizers of results, and INT32 biases: put into a model, found in it, and taken out again.

An integer kernel gives codes and adds a bias of whole steps, of its input's scale times its weight's. With these, the
fake-quant network computes what the kernels do.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import nn

from hawq_lightning._attention_calls import results_named
from hawq_lightning._patterns import WRAPPERS, plain_modules
from hawq_lightning.layers import (
    BIAS,
    RESULTS,
    ResultQuantizers,
    ResultReader,
    follow_all,
    operand_name,
    results_of,
    unfollow_all,
)
from hawq_lightning.quantization._attention import QuantizedOperand
from hawq_lightning.quantization._integer_bias import IntegerBias
from hawq_lightning.quantization._modules import spec_of
from hawq_lightning.quantization._quantizers import ActivationQuantizer
from hawq_lightning.quantization._registry import QuantizerSpec, quantizer_named


@dataclass(frozen=True, eq=False)
class QuantizedResult(ResultReader, QuantizedOperand):
    """A result that has a quantizer."""

    @property
    def input_quantizer(self) -> ActivationQuantizer:
        """Of what is made."""
        holder = cast(ResultQuantizers, results_of(self.module))
        return cast(ActivationQuantizer, holder[self.operand])

    def quantizer_of(self, kind: str) -> ActivationQuantizer:
        """As of a layer, which has two."""
        return self.input_quantizer

    @property
    def spec(self) -> QuantizerSpec:
        """The quantizer with its options."""
        holder = cast(ResultQuantizers, results_of(self.module))
        return quantizer_named(holder.quantizer_name, holder.quantizer_options)

    @property
    def prefix(self) -> str:
        """What the names of the holder's tensors begin with, in the model."""
        module = self.name.rpartition(":")[0]
        return f"{module}.{RESULTS}.".lstrip(".")


def quantized_results(model: nn.Module) -> dict[str, QuantizedResult]:
    """Name -> reader, of the results that have quantizers."""
    out = {}
    for name, module in plain_modules(model).items():
        for label in results_of(module) or ():
            out[operand_name(name, label)] = QuantizedResult(operand_name(name, label), module, label, model)
    return out


def with_result(reader: ResultReader) -> QuantizedResult:
    """The same result of a module that has a quantizer for it by now."""
    return QuantizedResult(reader.name, reader.module, reader.operand, reader.around)


def put_results(model: nn.Module, readers: Iterable[ResultReader], spec: QuantizerSpec) -> None:
    """Give results quantizers, off; those that there are of the same kind stay, others are taken out.

    Steps that a quantizer learns stay as they are calibrated, unless they are those of a layer on the same grid: when
    results are known, optimizers are made.

    Args:
        model: around all of them.
        readers: the results.
        spec: the quantizer.
    """
    labels: dict[nn.Module, list[str]] = {}
    for reader in readers:
        labels.setdefault(reader.module, []).append(reader.operand)
    for module in [m for m in model.modules() if results_of(m) is not None and m not in labels]:
        del module._modules[RESULTS]
    device = next((p.device for p in model.parameters()), None)
    for module, names in labels.items():
        held, options = results_of(module), dict(spec.options)
        same = held is not None and (held.quantizer_name, held.quantizer_options) == (spec.name, options)
        kept = {n: held[n] for n in names if n in held} if held is not None and same else {}
        made = {n: kept[n] if n in kept else spec.activation_quantizer().requires_grad_(False) for n in names}
        holder = ResultQuantizers(made, spec.name, options)
        module._modules[RESULTS] = (holder if device is None else holder.to(device)).train(module.training)
    if labels:
        follow_all(model)


def put_biases(model: nn.Module, biases: Mapping[str, str]) -> None:
    """Let layers add INT32 biases.

    Args:
        model: with fake-quant layers.
        biases: layer -> the BatchNorm that it takes in, or nothing.
    """
    drop_biases(model)
    modules = plain_modules(model)
    for name, norm in biases.items():
        if name in modules and (not norm or norm in modules):
            target = modules[norm or name]
            bias = IntegerBias(modules[name], modules[norm] if norm else None, _path(norm or name, name))
            device = next((t.device for t in (*target.parameters(), *target.buffers())), None)
            target._modules[BIAS] = (bias if device is None else bias.to(device)).train(target.training)
    if biases:
        follow_all(model)


@torch.no_grad()
def bake_biases(model: nn.Module) -> None:
    """Keep INT32 biases as the floats that they stand for, in place: from now on they follow nothing."""
    for module in model.modules():
        bias = module._modules.pop(BIAS, None)
        if isinstance(bias, IntegerBias):
            bias.bake()


def put_alike(model: nn.Module, source: nn.Module) -> None:
    """Give a copy of a module the quantizers of results and the INT32 biases that the module has.

    Args:
        model: of the same names.
        source: with quantizers of results, or without.
    """
    theirs = quantized_results(source)
    if theirs:
        put_results(model, results_named(model, theirs).values(), next(iter(theirs.values())).spec)
    if biases := biases_of(source):
        put_biases(model, biases)


def drop_biases(model: nn.Module) -> None:
    """Float biases again."""
    for module in _python_modules(model):
        module._modules.pop(BIAS, None)


def drop_results(model: nn.Module) -> None:
    """Undo :func:`put_results` and :func:`put_biases`."""
    found = [m for m in _python_modules(model) if not {RESULTS, BIAS}.isdisjoint(m._modules)]
    for module in found:
        module._modules.pop(RESULTS, None)
        module._modules.pop(BIAS, None)
    if found:
        unfollow_all(model)


Aside = dict[nn.Module, nn.Module]


def _python_modules(model: nn.Module) -> Iterator[nn.Module]:
    """All but scripted ones, which take no quantizers."""
    return (m for m in model.modules() if not isinstance(m, torch.jit.ScriptModule))


def put_aside(model: nn.Module) -> tuple[Aside, Aside]:
    """Take quantizers of results and INT32 biases out for a while: module -> what it had, of either kind."""
    modules = [*_python_modules(model)]
    held = tuple({m: x for m in modules if (x := m._modules.get(key)) is not None} for key in (RESULTS, BIAS))
    drop_results(model)
    return held  # type: ignore[return-value]


def put_back(model: nn.Module, results: Aside, biases: Aside) -> None:
    """Undo :func:`put_aside`."""
    for key, held in ((RESULTS, results), (BIAS, biases)):
        for module, child in held.items():
            module._modules[key] = child
    if results or biases:
        follow_all(model)


def biases_of(model: nn.Module) -> dict[str, str]:
    """Layers that add INT32 biases -> the BatchNorm that each takes in, or nothing."""
    names = {id(m): n for n, m in reversed(plain_modules(model).items())}
    out = {}
    for module in _python_modules(model):
        bias = module._modules.get(BIAS)
        if isinstance(bias, IntegerBias):
            out[names[id(bias.layer)]] = "" if bias.norm is None else names[id(bias.norm)]
    return out


def prepare_results_of(model: nn.Module, state_dict: Iterable[str], prefix: str = "") -> None:
    """Give a model the quantizers of results and the INT32 biases that a state dict has.

    Args:
        model: changed in place.
        state_dict: or its keys.
        prefix: of the model's names in it.
    """
    results: dict[str, None] = {}
    biases: dict[str, str] = {}
    for key in state_dict:
        parts = [p for p in key.removeprefix(prefix).split(".") if p not in WRAPPERS]
        if RESULTS in parts:
            at = parts.index(RESULTS)
            results[operand_name(".".join(parts[:at]), parts[at + 1])] = None
        elif BIAS in parts:
            at = parts.index(BIAS)
            module = ".".join(parts[:at])
            layer = _at(module, parts[at + 1])
            biases[layer] = "" if layer == module else module
    readers = results_named(model, results)
    present = quantized_results(model)
    if readers and not readers.keys() <= present.keys():
        layers = (m for m in model.modules() if hasattr(m, "quantizer_options"))
        first = next(layers, None)
        spec = quantizer_named("uniform") if first is None else _spec(first)
        put_results(model, {**present, **readers}.values(), spec)
    if biases and biases.items() - biases_of(model).items():
        put_biases(model, biases)


def _spec(layer: nn.Module) -> QuantizerSpec:
    return spec_of(layer)  # type: ignore[arg-type]


def expect_results(model: nn.Module) -> None:
    """Let a model take in quantizers of results that a state dict has, though its modules have none so far."""
    hooks = model._load_state_dict_pre_hooks.values()
    if not any(getattr(hook, "hook", hook) is _put_before_loading for hook in hooks):
        model.register_load_state_dict_pre_hook(_put_before_loading)


def _put_before_loading(model: nn.Module, state_dict: Mapping[str, object], prefix: str, *_: object) -> None:
    prepare_results_of(model, [k for k in state_dict if k.startswith(prefix)], prefix)


def _path(start: str, to: str) -> str:
    """How one module is named from another, in letters that a buffer's name may have: ``^:conv1``."""
    here, there = start.split("."), to.split(".")
    if here == there:
        return "self"
    same = 0
    while same < min(len(here), len(there)) and here[same] == there[same]:
        same += 1
    return ":".join(["^"] * (len(here) - same) + there[same:])


def _at(start: str, path: str) -> str:
    """Undo :func:`_path`."""
    parts = start.split(".")
    for step in path.split(":") if path != "self" else ():
        parts = parts[:-1] if step == "^" else [*parts, step]
    return ".".join(p for p in parts if p)
