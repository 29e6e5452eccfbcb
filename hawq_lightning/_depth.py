"""Which layer is a network's last: the one with most layers in a row before it, as a real forward pass shows.

The order of calls does not tell it: auxiliary heads are often called after the head whose outputs count.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable

import torch
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hawq_lightning._types import FunctionInputs, Options


class LayerDepths(TorchDispatchMode):
    """Counts, while a model runs inside of ``with``, how many layers lie in a row behind every tensor.

    Attributes:
        of: layer -> the most layers in a row up to it, itself included.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.of: dict[str, int] = {}
        self._behind: dict[int, tuple[weakref.ref[torch.Tensor], int]] = {}  # id of a tensor, while it lives

    def passed(self, layer: str, read: torch.Tensor, output: torch.Tensor) -> None:
        """A layer was called."""
        depth = self.depth(read) + 1
        self.of[layer] = max(depth, self.of.get(layer, 0))
        self._set(output, depth)

    def last(self, layers: Iterable[str]) -> str:
        """Of some layers, in the order of their first calls, the last one with most layers before it."""
        return max(reversed([*layers]), key=lambda name: self.of[name], default="")

    def depth(self, tensor: object) -> int:
        """Most layers in a row behind a tensor."""
        known = self._behind.get(id(tensor))
        return known[1] if known is not None and known[0]() is tensor else 0

    def _set(self, tensor: torch.Tensor, depth: int) -> None:
        self._behind[id(tensor)] = (weakref.ref(tensor), max(depth, self.depth(tensor)))

    def __torch_dispatch__(
        self, func: OpOverload, types: object, args: FunctionInputs = (), kwargs: Options | None = None
    ) -> object:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        depth = max(map(self.depth, tree_leaves((args, kwargs))), default=0)
        if depth:
            for x in tree_leaves(out):
                if isinstance(x, torch.Tensor):
                    self._set(x, depth)
        return out
