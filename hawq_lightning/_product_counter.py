"""Multiply-accumulates of a whole forward pass, also of what is no layer."""

from __future__ import annotations

from types import TracebackType
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode


class ProductCounter(FlopCounterMode):
    """Counts the products that run inside, all modules together, without the backward passes that a loss makes.

    torch's counter keeps the modules apart by hooks on gradients, with which ``torch.autograd.grad`` inside of a loss
    (gradient penalties, adversarial examples) fails.
    """

    def __init__(self) -> None:
        super().__init__(display=False, custom_mapping=dict.fromkeys(_FUSED_ATTENTION, _attention_flops))
        self.mod_tracker = _OneModule()  # type: ignore[assignment]
        self._weights: dict[StorageWeakRef, str] = {}
        self._of: dict[str, int] = {}

    def follow(self, name: str, weight: torch.Tensor) -> None:
        """From now on also count by itself what is multiplied with a weight, its parts, and what is made of it alone.

        Args:
            name: of the layer.
            weight: as its forward reads it.
        """
        self._weights[StorageWeakRef(weight.untyped_storage())] = name

    def macs_of(self, name: str) -> int:
        """Counted so far with a weight that is followed."""
        return self._of.get(name, 0) // 2

    @property
    def macs(self) -> int:
        """Counted so far; a multiplication and an addition are one."""
        return self.get_total_flops() // 2

    def _count_flops(self, func_packet: object, out: object, args: Any, kwargs: Any) -> object:
        if torch._C._current_graph_task_id() != -1:
            return out
        if not self._weights:
            return super()._count_flops(func_packet, out, args, kwargs)  # type: ignore[no-untyped-call]
        before = self.get_total_flops()
        super()._count_flops(func_packet, out, args, kwargs)  # type: ignore[no-untyped-call]
        self._attribute(self.get_total_flops() - before, args, kwargs, out)
        return out

    def _attribute(self, flops: int, args: object, kwargs: object, out: object) -> None:
        read = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor) and t.is_floating_point()]
        names = [self._weights.get(StorageWeakRef(t.untyped_storage())) for t in read]
        name = next((n for n in names if n is not None), None)
        if name is None:
            return
        if flops:
            self._of[name] = self._of.get(name, 0) + flops
        elif all(n == name for n in names):
            for tensor in tree_leaves(out):
                if isinstance(tensor, torch.Tensor):
                    self._weights[StorageWeakRef(tensor.untyped_storage())] = name


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
