"""What lists, dicts, arrays, tensors and random generators hold, put back exactly: the same objects and values."""

from __future__ import annotations

import array
import operator
from collections import deque
from collections.abc import Callable, Iterable
from functools import partial
from types import BuiltinFunctionType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import nn

from hawq_lightning.sensitivity._generator_state import generator_put_back

PutBack = Callable[[], object]

_NOTHING_INSIDE = frozenset(
    {type(None), bool, int, float, complex, str, bytes, type, range, slice, BuiltinFunctionType, ModuleType}
)
_TENSORS = (torch.Tensor, nn.Parameter)


def contents_put_back(value: object) -> PutBack | None:
    """What puts the contents that a value has now back into it; ``None`` for what is no container, array or generator.

    Lists, dicts, sets, deques, arrays, tensors (expanded ones too) and random generators; of what lies in a container
    the object alone is put back.

    Args:
        value: any object.
    """
    if isinstance(value, (list, deque)):
        return partial(_refill, value, list(value))
    if isinstance(value, dict):
        return dict_put_back(value)
    if isinstance(value, set):
        return partial(_replace_set, value, set(value))
    if isinstance(value, torch.Tensor):
        return _tensor_put_back(value)
    if isinstance(value, np.ndarray):
        return partial(_copy_into, value, value.copy())
    if isinstance(value, (bytearray, array.array)):
        return partial(value.__setitem__, slice(None), value[:])
    return generator_put_back(value)


def dict_put_back(value: dict[Any, object]) -> PutBack:
    """What gives a dict the keys and objects that it has now, such as an object's attributes.

    Args:
        value: may be an object's ``__dict__``.
    """
    return partial(_replace, value, dict(value))


def worth_a_look(values: Iterable[object]) -> list[object]:
    """Those that something could change: no numbers or texts, and no tuples of these.

    Args:
        values: of a container; of a million numbers there is none, within some hundredths of a second.
    """
    atoms = _NOTHING_INSIDE
    return [x for x in values if type(x) not in atoms and not (type(x) is tuple and atoms.issuperset(map(type, x)))]


def _refill(value: list[object] | deque[object], held: list[object]) -> None:
    if len(value) != len(held) or not all(map(operator.is_, value, held)):
        value.clear()
        value.extend(held)


def _replace(value: dict[Any, object], held: dict[Any, object]) -> None:
    if [*value] != [*held] or not all(map(operator.is_, value.values(), held.values())):
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


def _tensor_put_back(tensor: torch.Tensor) -> PutBack | None:
    unlike = tensor.is_inference() or tensor.is_meta or tensor.is_nested or tensor.layout != torch.strided
    if unlike or type(tensor) not in _TENSORS:
        return None
    data = tensor.data
    for axis, stride in enumerate(data.stride()):  # of an expanded tensor there is one in memory
        if stride == 0 and data.shape[axis]:
            data = data.narrow(axis, 0, 1)
    return partial(_put_back_tensor, tensor, tensor.data, data, data.clone())


@torch.no_grad()
def _put_back_tensor(tensor: torch.Tensor, data: torch.Tensor, memory: torch.Tensor, held: torch.Tensor) -> None:
    if tensor.data_ptr() != data.data_ptr() or tensor.shape != data.shape:
        tensor.data = data
    if not torch.equal(memory, held):
        memory.copy_(held)
