"""Where layers read: one call-back for every tensor that a set of layers reads, once a tensor."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any

import torch
from torch import nn

from hawq_lightning._reads import version_of
from hawq_lightning.layers import OperandReader, ResultReader, WeightReader, as_reader

Replace = Callable[[str, torch.Tensor], torch.Tensor]


class InputHooks:
    """While active, ``visit(site, tensor)`` sees each tensor that the layers of a site read, and may replace it.

    Layers that read the same tensor get the same replacement, so gradients through all of them add up in it. A tensor
    that was changed in place counts as another one.

    Args:
        layers: layer name -> reader of a weight, or the module if it reads a single one; operand of
            attention -> its reader.
        site_of: name of either -> activation site name.
        visit: called once for every tensor; what it returns is what the layers read.
    """

    def __init__(
        self, layers: Mapping[str, nn.Module | WeightReader | OperandReader], site_of: Mapping[str, str], visit: Replace
    ) -> None:
        self._layers, self._site_of, self._visit = layers, site_of, visit
        self._seen: dict[tuple[int, int], tuple[weakref.ref[torch.Tensor], torch.Tensor]] = {}
        self._made: dict[tuple[int, int], tuple[weakref.ref[torch.Tensor], str]] = {}  # results that were visited
        self._handles: list[Any] = []

    def __enter__(self) -> InputHooks:
        for name, layer in self._layers.items():
            if name in self._site_of:
                reader = layer if isinstance(layer, OperandReader) else as_reader(layer)
                made = isinstance(reader, ResultReader)
                self._handles.append(reader.on_read(self._visit_once(self._site_of[name], made)))
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.clear()

    def clear(self) -> None:
        """Forget the tensors seen: a new forward pass begins."""
        self._seen.clear()
        self._made.clear()

    def _visit_once(self, site: str, made: bool) -> Callable[[torch.Tensor], torch.Tensor]:
        def replace(x: torch.Tensor) -> torch.Tensor:
            key = (id(x), version_of(x))
            if (visited := self._made.get(key)) is not None and visited[0]() is x and visited[1] == site:
                return x  # a layer reads a result of its own site
            seen = self._seen.get(key)
            if seen is None or seen[0]() is not x:
                seen = (weakref.ref(x), self._visit(site, x))
                if made:
                    result = seen[1].clone() if seen[1]._is_view() else seen[1]  # it may be changed in place
                    self._made[id(result), version_of(result)] = (weakref.ref(result), site)
                    return result
                self._seen[key] = seen
            return seen[1]

        return replace
