"""Quantizers of what attention reads: put into a model, found in it, and taken out again."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import cast

from torch import nn

from hawq_lightning._attention_calls import attention_operands
from hawq_lightning._patterns import Patterns
from hawq_lightning.layers import (
    HOLDER,
    OPERANDS,
    AttentionQuantizers,
    OperandReader,
    drop_holder,
    find_kind,
    holder_of,
    put_holder,
)
from hawq_lightning.quantization._modules import spec_of, to_fake_quantized
from hawq_lightning.quantization._quantizers import ActivationQuantizer
from hawq_lightning.quantization._registry import QuantizerSpec, quantizer_named


@dataclass(frozen=True, eq=False)
class QuantizedOperand(OperandReader):
    """What attention reads as one of its factors, of a module that has quantizers for it."""

    @property
    def input_quantizer(self) -> ActivationQuantizer:
        """Of what is read."""
        holder = cast(AttentionQuantizers, holder_of(self.module))
        return cast(ActivationQuantizer, holder[self.operand])

    def quantizer_of(self, kind: str) -> ActivationQuantizer:
        """As of a layer, which has two."""
        return self.input_quantizer

    @property
    def spec(self) -> QuantizerSpec:
        """The quantizer with its options."""
        return spec_of_attention(self.module)

    @property
    def prefix(self) -> str:
        """What the names of the holder's tensors begin with, in the model."""
        module = self.name.rpartition(":")[0]
        return f"{module}.{HOLDER}.".lstrip(".")


def spec_of_attention(module: nn.Module) -> QuantizerSpec:
    """The quantizer of what a module's attention reads, with its options."""
    holder = cast(AttentionQuantizers, holder_of(module))
    return quantizer_named(holder.quantizer_name, holder.quantizer_options)


def quantized_operands(model: nn.Module) -> dict[str, QuantizedOperand]:
    """Operand's name -> reader, of the modules that have quantizers for them."""
    return {n: with_operand(x) for n, x in attention_operands(model, prepared=True).items()}


def with_operand(reader: OperandReader) -> QuantizedOperand:
    """The same operand of a module that has quantizers by now."""
    return QuantizedOperand(reader.name, reader.module, reader.operand)


def put_attention(module: nn.Module, spec: QuantizerSpec) -> AttentionQuantizers:
    """Give a module quantizers for what its attention reads, off; those that it has of the same kind stay.

    Args:
        module: that makes attention; its class stays, but for one that is a layer and hides its products otherwise.
        spec: the quantizer.
    """
    if find_kind(module) is not None:
        to_fake_quantized(module, spec)
    holder, options = holder_of(module), dict(spec.options)
    if holder is not None and (holder.quantizer_name, holder.quantizer_options) == (spec.name, options):
        return holder
    tensor = next(module.parameters(), None)
    made = AttentionQuantizers({n: spec.activation_quantizer() for n in OPERANDS}, spec.name, options)
    if holder is not None and holder.quantizer_name == spec.name:
        made.load_state_dict(holder.state_dict())
    if tensor is not None:
        made.to(tensor.device)
    put_holder(module, made.train(module.training))
    return made


def prepare_attention(
    model: nn.Module, include: Patterns, exclude: Patterns, quantizer: str | QuantizerSpec | None
) -> None:
    """Give every module whose forward makes attention quantizers for what that reads, off; may be called again.

    Args:
        model: changed in place.
        include: see :func:`hawq_lightning.sites`.
        exclude: the same forms; wins over ``include``.
        quantizer: registered name; ``None``: ``uniform``, and those that there are stay.
    """
    for module in {x.module: None for x in attention_operands(model, include, exclude).values()}:
        if quantizer is not None or holder_of(module) is None:
            put_attention(module, quantizer_named(quantizer or "uniform"))


def drop_attention(model: nn.Module) -> None:
    """Undo :func:`prepare_attention`."""
    for module in model.modules():
        drop_holder(module)


def prepare_attention_of(model: nn.Module, state_dict: Iterable[str], prefix: str = "") -> None:
    """Give those modules quantizers of attention that a state dict has some for.

    Args:
        model: changed in place.
        state_dict: or its keys.
        prefix: of the model's names in it.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    names = {k.removeprefix(prefix).partition(f"{HOLDER}.")[0].rstrip(".") for k in state_dict if f"{HOLDER}." in k}
    for name in names:
        if (module := modules.get(name)) is not None and holder_of(module) is None:
            layers = (m for m in model.modules() if hasattr(m, "quantizer_options"))
            put_attention(module, _spec_beside(next(layers, None)))


def _spec_beside(layer: nn.Module | None) -> QuantizerSpec:
    return quantizer_named("uniform") if layer is None else spec_of(layer)  # type: ignore[arg-type]


def expect_attention(model: nn.Module) -> None:
    """Let a model take in the quantizers of attention that a state dict has, though its modules have none so far."""
    hooks = model._load_state_dict_pre_hooks.values()
    if not any(getattr(hook, "hook", hook) is _put_before_loading for hook in hooks):
        model.register_load_state_dict_pre_hook(_put_before_loading)


def _put_before_loading(model: nn.Module, state_dict: Mapping[str, object], prefix: str, *_: object) -> None:
    prepare_attention_of(model, [k for k in state_dict if k.startswith(prefix)], prefix)
