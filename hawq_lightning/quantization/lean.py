"""Keep the recipe instead of the copy: the quantized input of a layer is made again when the backward pass needs it.

A float layer and the ReLU before it keep one tensor for both. Fake-quantization puts a second one between them; made
again in the backward pass, for the price of some vectorised passes, it need not be kept.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, TypeVar

import torch

Method = TypeVar("Method", bound=Callable[..., torch.Tensor])
_NOTHING = contextlib.nullcontext()


def repeatable(method: Method) -> Method:
    """Mark a ``quantize`` that gives the same again and changes nothing, so that it may run twice a step."""
    method.repeatable = True  # type: ignore[attr-defined]
    return method


def made_again(made: torch.Tensor, source: torch.Tensor, quantizer: Any) -> contextlib.AbstractContextManager[Any]:
    """Inside, operations that would keep ``made`` for their backward pass keep ``source`` and its quantizer.

    Args:
        made: ``quantizer(source)``.
        source: what was quantized; others keep it anyway.
        quantizer: whose ``quantize`` is marked :func:`repeatable`; with others nothing happens.
    """
    if made is source or not torch.is_grad_enabled() or torch.compiler.is_compiling() or _others_decide():
        return _NOTHING
    if not quantizer.bits or quantizer.paused or quantizer._leader:
        return _NOTHING
    if not getattr(type(quantizer).quantize, "repeatable", False):
        return _NOTHING
    address, numel, version = made.data_ptr(), made.numel(), source._version
    kept = source.detach()

    def pack(tensor: torch.Tensor) -> Any:
        if tensor.data_ptr() == address and tensor.numel() == numel and tensor.dtype == kept.dtype:
            return tuple(tensor.shape), tensor.stride()  # a view of it, perhaps
        return tensor

    def unpack(packed: Any) -> torch.Tensor:
        if isinstance(packed, torch.Tensor):
            return packed
        if kept._version != version:
            raise RuntimeError(
                "A quantized layer needs its input for the backward pass, but it was modified by an in-place operation."
            )
        with torch.no_grad():
            return quantizer.quantize(kept).as_strided(*packed)  # type: ignore[no-any-return]

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)


def _others_decide() -> bool:
    """Whether activation checkpointing or offloading is at work, which keeps less still."""
    look = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    return look is not None and look(True) is not None
