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
        super().__init__(display=False)
        self.mod_tracker = _OneModule()  # type: ignore[assignment]

    @property
    def macs(self) -> int:
        """Counted so far; a multiplication and an addition are one."""
        return self.get_total_flops() // 2

    def _count_flops(self, func_packet: object, out: object, args: Any, kwargs: Any) -> object:
        if torch._C._current_graph_task_id() != -1:
            return out
        return super()._count_flops(func_packet, out, args, kwargs)  # type: ignore[no-untyped-call]


class _OneModule:
    parents = frozenset({"Global"})

    def __enter__(self) -> _OneModule:
        return self

    def __exit__(
        self, kind: type | None = None, error: BaseException | None = None, trace: TracebackType | None = None
    ) -> None:
        pass
