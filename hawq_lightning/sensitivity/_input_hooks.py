"""Where layers read: one call-back for every tensor that a set of layers reads, once a tensor."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any

import torch
from torch import nn

from hawq_lightning._sites import version_of

Replace = Callable[[str, torch.Tensor], torch.Tensor]


class InputHooks:
    """While active, ``visit(site, tensor)`` sees each tensor that the layers of a site read, and may replace it.

    Layers that read the same tensor get the same replacement, so gradients through all of them add up in it. A tensor
    that was changed in place counts as another one.

    Args:
        layers: layer name -> module.
        site_of: layer name -> activation site name.
        visit: called once for every tensor; what it returns is what the layers read.
    """

    def __init__(self, layers: Mapping[str, nn.Module], site_of: Mapping[str, str], visit: Replace) -> None:
        self._layers, self._site_of, self._visit = layers, site_of, visit
        self._seen: dict[tuple[int, int], tuple[weakref.ref[torch.Tensor], torch.Tensor]] = {}
        self._handles: list[Any] = []

    def __enter__(self) -> InputHooks:
        for name, module in self._layers.items():
            if name in self._site_of:
                hook = self._hook(self._site_of[name])
                self._handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._seen.clear()

    def clear(self) -> None:
        """Forget the tensors seen: a new forward pass begins."""
        self._seen.clear()

    def _hook(self, site: str) -> Callable[..., tuple[tuple[Any, ...], dict[str, Any]]]:
        def replace(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            x = args[0] if args else kwargs["input"]
            key = (id(x), version_of(x))
            seen = self._seen.get(key)
            if seen is None or seen[0]() is not x:
                seen = (weakref.ref(x), self._visit(site, x))
                self._seen[key] = seen
            if args:
                return (seen[1], *args[1:]), kwargs
            return args, {**kwargs, "input": seen[1]}

        return replace
