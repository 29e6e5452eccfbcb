"""Plain attributes of modules, put back exactly after somebody's forward pass: counters, queues, arrays, generators."""

from __future__ import annotations

import array
from collections import deque
from collections.abc import Callable, Iterable
from functools import partial
from types import FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import nn

from hawq_lightning.sensitivity._generator_state import generator_put_back

_INTERNAL = {"training", "_parameters", "_buffers", "_modules", "_trainer", "_fabric", "trainer"}
_LIBRARIES = ("torch", "lightning", "pytorch_lightning", "numpy", "builtins", "hawq_lightning")
_DEPTH = 4  # of objects in objects

PutBack = Callable[[], object]


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
        if isinstance(value, (list, deque)):
            self._contents.append(partial(_refill, value, list(value)))
            parts = list(value)
        elif isinstance(value, dict):
            self._contents.append(partial(_replace, value, dict(value)))
            parts = list(value.values())
        elif isinstance(value, set):
            self._contents.append(partial(_replace_set, value, set(value)))
        elif isinstance(value, tuple):
            parts = value
        elif isinstance(value, torch.Tensor):
            self._note_tensor(value)
        elif isinstance(value, np.ndarray):
            self._contents.append(partial(_copy_into, value, value.copy()))
        elif isinstance(value, (bytearray, array.array)):
            self._contents.append(partial(value.__setitem__, slice(None), value[:]))
        elif (put_back := generator_put_back(value)) is not None:
            self._contents.append(put_back)
        elif isinstance(value, nn.Module):
            parts = [*value.parameters(), *value.buffers()]
        elif (
            depth < _DEPTH
            and hasattr(value, "__dict__")
            and not isinstance(value, MethodType)
            and not of_library(value)
        ):
            self._contents.append(partial(_replace, value.__dict__, dict(value.__dict__)))
            parts = list(value.__dict__.values())
        for part in parts:
            self._note(part, depth + 1)

    def _note_tensor(self, tensor: torch.Tensor) -> None:
        if tensor.is_inference() or tensor.is_meta or tensor.layout != torch.strided or type(tensor) not in _TENSORS:
            return
        data = tensor.data
        for axis, stride in enumerate(data.stride()):  # of an expanded tensor there is one in memory
            if stride == 0 and data.shape[axis]:
                data = data.narrow(axis, 0, 1)
        self._contents.append(partial(_put_back_tensor, tensor, tensor.data, data, data.clone()))


def plain_attributes(module: nn.Module) -> dict[str, object]:
    """What a module holds beside parameters, buffers, submodules and hooks, and Lightning's ways to the Trainer."""
    return {n: v for n, v in module.__dict__.items() if n not in _INTERNAL and "_hooks" not in n}


def of_library(value: object, *more: str) -> bool:
    """Whether an object is of a class of Python, torch, Lightning, NumPy, this package, or of ``more`` packages."""
    return type(value).__module__.split(".")[0] in (*_LIBRARIES, *more)


def _is_users(value: object) -> bool:
    return hasattr(value, "__dict__") and not isinstance(value, MethodType) and not of_library(value)


_TENSORS = (torch.Tensor, nn.Parameter)


def _refill(value: list[object] | deque[object], held: list[object]) -> None:
    if len(value) != len(held) or any(a is not b for a, b in zip(value, held)):
        value.clear()
        value.extend(held)


def _replace(value: dict[Any, object], held: dict[Any, object]) -> None:
    if [*value] != [*held] or any(value[k] is not v for k, v in held.items()):
        value.clear()
        value.update(held)


def _replace_set(value: set[object], held: set[object]) -> None:
    if value != held:
        value.clear()
        value.update(held)


def _copy_into(value: np.ndarray, held: np.ndarray) -> None:
    if value.shape != held.shape:
        value.resize(held.shape, refcheck=False)
    if value.flags.writeable:
        np.copyto(value, held)


@torch.no_grad()
def _put_back_tensor(tensor: torch.Tensor, data: torch.Tensor, memory: torch.Tensor, held: torch.Tensor) -> None:
    if tensor.data_ptr() != data.data_ptr() or tensor.shape != data.shape:
        tensor.data = data
    if not torch.equal(memory, held):
        memory.copy_(held)
