"""Plain attributes of modules, put back exactly after somebody's forward pass: counters, queues, arrays, generators."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from types import FunctionType, MethodType, ModuleType

import torch
from torch import nn

from hawq_lightning.sensitivity._held_contents import PutBack, contents_put_back, dict_put_back, worth_a_look

_INTERNAL = {"training", "_parameters", "_buffers", "_modules", "_trainer", "_fabric", "trainer"}
_LIBRARIES = ("torch", "lightning", "pytorch_lightning", "numpy", "builtins", "hawq_lightning")
_DEPTH = 4  # of objects in objects
_KNOWN = (tuple, torch.Tensor)


class HeldAttributes:
    """What plain attributes of modules hold: the same objects come back, with the same contents.

    Lists, dicts, sets, deques, arrays, tensors (expanded ones too), random generators, modules that are no submodules,
    and objects of the user's, each with what is in it. Parameters, buffers and submodules are looked after elsewhere.

    Args:
        modules: of a model.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        held = [*modules]
        self._seen = {id(x) for m in held for x in (m, *m._parameters.values(), *m._buffers.values()) if x is not None}
        self._contents: list[PutBack] = []
        self._attributes = []
        for module in held:
            plain = plain_attributes(module)
            for value in plain.values():
                self._note(value, 0)
            self._attributes.append((module, plain))

    def put_back(self) -> None:
        """Attributes as they were; those that are new go."""
        for module, plain in self._attributes:
            for name in plain_attributes(module).keys() - plain.keys():
                del module.__dict__[name]
            module.__dict__.update(plain)
        for put_back in reversed(self._contents):
            put_back()
        for module, plain in self._attributes:
            for name, value in plain.items():
                # a metric's state after trainer.validate cannot be written to
                if isinstance(value, torch.Tensor) and value.is_inference():
                    module.__dict__[name] = value.clone()

    def _note(self, value: object, depth: int) -> None:
        if id(value) in self._seen or isinstance(value, (type, str, bytes, int, float, ModuleType, FunctionType)):
            return
        self._seen.add(id(value))
        parts: Iterable[object] = ()
        if isinstance(value, (list, deque, tuple)):
            parts = value
        elif isinstance(value, dict):
            parts = value.values()
        elif isinstance(value, nn.Module):
            parts = [*value.parameters(), *value.buffers()]
        if (put_back := contents_put_back(value)) is not None:
            self._contents.append(put_back)
        elif depth < _DEPTH and _is_users(value) and not isinstance(value, (nn.Module, *_KNOWN)):
            self._contents.append(dict_put_back(value.__dict__))
            parts = value.__dict__.values()
        for part in worth_a_look(parts):
            self._note(part, depth + 1)


def plain_attributes(module: nn.Module) -> dict[str, object]:
    """What a module holds beside parameters, buffers, submodules and hooks, and Lightning's ways to the Trainer."""
    return {n: v for n, v in module.__dict__.items() if n not in _INTERNAL and "_hooks" not in n}


def of_library(value: object, *more: str) -> bool:
    """Whether an object is of a class of Python, torch, Lightning, NumPy, this package, or of ``more`` packages."""
    return type(value).__module__.split(".")[0] in (*_LIBRARIES, *more)


def _is_users(value: object) -> bool:
    return hasattr(value, "__dict__") and not isinstance(value, MethodType) and not of_library(value)
