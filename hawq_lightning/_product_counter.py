"""Multiply-accumulates of a whole forward pass, also of what is no layer."""

from __future__ import annotations

from types import TracebackType
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode


class ProductCounter(FlopCounterMode):
    """Counts the products that run inside, all modules together, without the backward passes that a loss makes.

    torch's counter keeps the modules apart by hooks on gradients, with which ``torch.autograd.grad`` inside of a loss
    (gradient penalties, adversarial examples) fails.
    """

    def __init__(self) -> None:
        super().__init__(display=False, custom_mapping=dict.fromkeys(_FUSED_ATTENTION, _attention_flops))
        self.mod_tracker = _OneModule()  # type: ignore[assignment]

    @property
    def macs(self) -> int:
        """Counted so far; a multiplication and an addition are one."""
        return self.get_total_flops() // 2

    def _count_flops(self, func_packet: object, out: object, args: Any, kwargs: Any) -> object:
        if torch._C._current_graph_task_id() != -1:
            return out
        return super()._count_flops(func_packet, out, args, kwargs)  # type: ignore[no-untyped-call]


# kernels that torch's counter does not know
_FUSED_ATTENTION = [
    getattr(torch.ops.aten, name)
    for name in (
        "_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_fused_attention_overrideable",
        "_scaled_dot_product_attention_math_for_mps",
    )
    if hasattr(torch.ops.aten, name)
]  # fmt: skip


def _attention_flops(query: torch.Size, key: torch.Size, value: torch.Size, *_: object, **__: object) -> int:
    """Of ``[..., queries, width]``, ``[..., keys, width]`` and ``[..., keys, values]``; heads may be shared."""
    pairs = query[:-1].numel() * key[-2]
    return 2 * pairs * (query[-1] + value[-1])


class _OneModule:
    parents = frozenset({"Global"})

    def __enter__(self) -> _OneModule:
        return self

    def __exit__(
        self, kind: type | None = None, error: BaseException | None = None, trace: TracebackType | None = None
    ) -> None:
        pass
