"""Backward hooks of the user's, which may look at gradients and not change them while traces are measured.

A trace is that of the loss. Hooks that clip or scale gradients (``h.register_hook``, ``register_full_backward_hook``)
change how a network trains, not what it computes.
"""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from types import TracebackType
from typing import Any, Self

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from hawq_lightning._types import FunctionInputs, Options
from hawq_lightning.sensitivity._asking import asking_module

Hook = Callable[..., object]
_BETWEEN = ("torch.overrides", "torch._tensor")


class HooksOnlyLook(TorchFunctionMode):
    """Context in which hooks of parameters and modules, and those that a forward pass registers, change nothing.

    Args:
        model: whose parameters and modules may have hooks.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._model = model
        self._held: list[tuple[MutableMapping[Any, Hook], dict[Any, Hook]]] = []

    def __enter__(self) -> Self:
        everywhere = nn.modules.module
        places = [everywhere._global_backward_hooks, everywhere._global_backward_pre_hooks]
        for module in self._model.modules():
            places += [module._backward_hooks, module._backward_pre_hooks]
        places += [p._backward_hooks for p in self._model.parameters()]  # type: ignore[misc]
        for hooks in places:
            if hooks:
                self._held.append((hooks, dict(hooks)))
                hooks.update({key: _only_looking(hook) for key, hook in hooks.items()})
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        super().__exit__(kind, error, trace)  # type: ignore[no-untyped-call]
        for hooks, held in self._held:
            hooks.update({key: hook for key, hook in held.items() if key in hooks})
        self._held.clear()

    def __torch_function__(
        self, func: Callable[..., object], types: object, args: FunctionInputs = (), kwargs: Options | None = None
    ) -> object:
        if func is torch.Tensor.register_hook and not f"{asking_module(*_BETWEEN)}.".startswith("hawq_lightning."):
            tensor, hook = (*args, *(kwargs or {}).values())
            return func(tensor, _only_looking(hook))
        return func(*args, **(kwargs or {}))


def _only_looking(hook: Hook) -> Hook:
    def look(*args: object) -> None:
        hook(*(_copies(x) if isinstance(x, (tuple, torch.Tensor)) else x for x in args))

    return look


def _copies(grads: object) -> object:
    """So that what is written to them is lost."""
    return tree_map(lambda x: x.clone() if isinstance(x, torch.Tensor) else x, grads)
