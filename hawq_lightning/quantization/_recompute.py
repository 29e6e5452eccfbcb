"""Keep the recipe instead of the copy: quantized inputs and weights are made again when the backward pass needs them.

A float layer and the ReLU before it keep one tensor for both. Fake-quantization puts a second one between them; made
again in the backward pass, for the price of some vectorised passes, it need not be kept. Nor does the quantizer's
backward pass need memory: the layer alone has the gradient that comes to it, which is overwritten.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, TypeVar

import torch

Method = TypeVar("Method", bound=Callable[..., torch.Tensor])
_NOTHING = contextlib.nullcontext()


def deterministic(method: Method) -> Method:
    """Mark a ``quantize`` that gives the same again and changes nothing, so that it may run twice a step."""
    method.deterministic = True  # type: ignore[attr-defined]
    return method


def recompute_in_backward(*operands: tuple[torch.Tensor, torch.Tensor, Any]) -> contextlib.AbstractContextManager[Any]:
    """Inside, operations that would keep a quantized operand for their backward pass keep what it was made of.

    Args:
        operands: ``(quantizer(source), source, quantizer)`` each; others keep the source anyway. Quantizers whose
            ``quantize`` is not marked :func:`deterministic` are left alone.
    """
    if not torch.is_grad_enabled() or torch.compiler.is_compiling() or _others_decide():
        return _NOTHING
    own = [operand for operand in operands if _can_repeat(*operand)]
    if not own:
        return _NOTHING
    recipes = [_Recipe(*operand) for operand in own]
    for made, _, _ in own:  # one operation reads it, and makes a gradient of its own for it
        if hasattr(made.grad_fn, "alone"):
            made.grad_fn.alone = True  # type: ignore[union-attr]

    def pack(tensor: torch.Tensor) -> Any:
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
    def __init__(self, made: torch.Tensor, source: torch.Tensor, quantizer: Any) -> None:
        self._address, self._numel = made.data_ptr(), made.numel()
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
            return self._quantizer.quantize(self._source)  # type: ignore[no-any-return]


def _can_repeat(made: torch.Tensor, source: torch.Tensor, quantizer: Any) -> bool:
    if made is source or not quantizer.bits or quantizer.fake_quant_disabled or quantizer._tied_to:
        return False
    return not quantizer._forward_hooks and getattr(type(quantizer).quantize, "deterministic", False)


def _others_decide() -> bool:
    """Whether others look after memory (checkpointing, offloading), or torch.func runs, without addresses."""
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return True
    look = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    return look is not None and look(True) is not None
