"""Keep the recipe instead of the copy: quantized inputs and weights are made again when the backward pass needs them.

A float layer and the ReLU before it keep one tensor for both. Fake-quantization puts a second one between them; made
again in the backward pass, for the price of some vectorised passes, it need not be kept. Nor does the quantizer's
backward pass need memory: the layer alone has the gradient that comes to it, which is overwritten.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any, Protocol, TypeVar

import torch

from hawq_lightning._torch_state import traced, transformed

Method = TypeVar("Method", bound=Callable[..., torch.Tensor])
Operand = tuple[torch.Tensor, torch.Tensor, "Recomputable"]
_NOTHING = contextlib.nullcontext()


class Recomputable(Protocol):
    """What a quantizer has that is run again: ``quantize``, and what tells whether it would give the same."""

    bits: int
    fake_quant_disabled: bool
    _tied_to: tuple[object, ...]
    _forward_hooks: Mapping[int, Callable[..., object]]

    def quantize(self, x: torch.Tensor) -> torch.Tensor:
        """Rounded to the grid."""


def deterministic(method: Method) -> Method:
    """Mark a ``quantize`` that gives the same again and changes nothing, so that it may run twice a step."""
    method.deterministic = True  # type: ignore[attr-defined]
    return method


def recompute_in_backward(*operands: Operand) -> contextlib.AbstractContextManager[object]:
    """Inside, operations that would keep a quantized operand for their backward pass keep what it was made of.

    Args:
        operands: ``(quantizer(source), source, quantizer)`` each; others keep the source anyway. Quantizers whose
            ``quantize`` is not marked :func:`deterministic` are left alone.
    """
    if not torch.is_grad_enabled() or torch.compiler.is_compiling() or _others_decide():
        return _NOTHING
    repeated = [operand for operand in operands if _can_repeat(*operand)]
    if not repeated or not all(isinstance(output, torch.Tensor) for output, _, _ in operands):  # traced by symbols
        return _NOTHING
    recipes = [_Recipe(*operand) for operand in repeated]
    for output, _, _ in repeated:  # one operation reads it, and makes a gradient of its own for it
        if hasattr(output.grad_fn, "grad_is_exclusive"):
            output.grad_fn.grad_is_exclusive = True  # type: ignore[union-attr]

    def pack(tensor: torch.Tensor) -> object:
        for recipe in recipes:
            if recipe.makes(tensor):
                return recipe, tuple(tensor.shape), tensor.stride()  # a view of it, perhaps
        return tensor

    def unpack(packed: Any) -> torch.Tensor:
        if isinstance(packed, torch.Tensor):
            return packed
        recipe, shape, stride = packed
        return recipe.again().as_strided(shape, stride)  # type: ignore[no-any-return]

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)


class _Recipe:
    def __init__(self, output: torch.Tensor, source: torch.Tensor, quantizer: Recomputable) -> None:
        self._address, self._numel = output.data_ptr(), output.numel()
        self._source, self._version, self._quantizer = source.detach(), source._version, quantizer

    def makes(self, tensor: torch.Tensor) -> bool:
        same = tensor.data_ptr() == self._address and tensor.numel() == self._numel
        return same and tensor.dtype == self._source.dtype

    def again(self) -> torch.Tensor:
        if self._source._version != self._version:
            raise RuntimeError(
                "A quantized layer needs its input and weight for the backward pass, but one was modified by an "
                "in-place operation."
            )
        with torch.no_grad():
            return self._quantizer.quantize(self._source)


def _can_repeat(output: torch.Tensor, source: torch.Tensor, quantizer: Recomputable) -> bool:
    # a deployed network has constants in the places of quantizers
    if not getattr(getattr(type(quantizer), "quantize", None), "deterministic", False) or output is source:
        return False
    return bool(quantizer.bits) and not (
        quantizer.fake_quant_disabled or quantizer._tied_to or quantizer._forward_hooks
    )


def _others_decide() -> bool:
    """Whether others look after memory (checkpointing, offloading), or torch.func or a tracer runs."""
    if transformed() or traced():
        return True
    look = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    return look is not None and look(True) is not None
