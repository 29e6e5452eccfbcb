"""Random generators that loaders, data sets, samplers and collate functions hold of their own are put back."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FunctionType, ModuleType

import numpy as np
import torch
from torch.utils._pytree import tree_leaves

from hawq_lightning.sensitivity import generator_put_back

_DEPTH = 12  # of objects in objects: the transforms of a data set in a subset, with the lists that hold them
_MANY = 64  # longer lists hold samples


@contextmanager
def own_generators_kept(loaders: object) -> Iterator[None]:
    """Put back every torch, NumPy and Python generator that is an attribute of loaders or of what they hold.

    Args:
        loaders: one, or several in containers.
    """
    put_back: list[Callable[[], object]] = []
    seen: set[int] = set()
    for loader in tree_leaves(loaders):
        _note(loader, 0, seen, put_back)
    try:
        yield
    finally:
        for back in put_back:
            back()


def _note(value: object, depth: int, seen: set[int], put_back: list[Callable[[], object]]) -> None:
    nothing = (torch.Tensor, np.ndarray, str, bytes, int, float, type, ModuleType)
    if value is None or id(value) in seen or depth > _DEPTH or isinstance(value, nothing):
        return
    seen.add(id(value))
    if (back := generator_put_back(value)) is not None:
        put_back.append(back)
        return
    for part in _parts(value):
        _note(part, depth + 1, seen, put_back)


def _parts(value: object) -> list[object]:
    if isinstance(value, (list, tuple, dict)):
        held = list(value.values()) if isinstance(value, dict) else list(value)
        return held if len(held) <= _MANY else []
    if isinstance(value, functools.partial):
        return [value.func, *value.args, *value.keywords.values()]
    if inspect.ismethod(value):
        return [value.__self__]
    if isinstance(value, FunctionType):  # a collate function that closes over its generator
        cells = inspect.getclosurevars(value).nonlocals if value.__closure__ else {}
        return list(cells.values())
    return list(getattr(value, "__dict__", {}).values())
