"""What reading data moves is put back: counters, lists, caches, generators of loaders, data sets, collate functions.

Training then reads what it would have read if nobody had measured.
"""

from __future__ import annotations

import array
import ctypes
import functools
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor
from contextlib import contextmanager
from functools import lru_cache, partial
from multiprocessing.process import BaseProcess
from multiprocessing.sharedctypes import SynchronizedBase
from pathlib import Path
from threading import Thread
from types import CellType, FunctionType, MethodType, SimpleNamespace
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Trainer
from torch import nn
from torch.utils.data import DataLoader, Dataset, Sampler

from hawq_lightning.callbacks._trainer._namespaces import kinds
from hawq_lightning.sensitivity import PutBack, contents_put_back, dict_put_back, generator_put_back, worth_a_look

_DEPTH = 12  # of objects in objects: the transforms of a data set in a subset, with the lists that hold them
_OBJECTS = 100_000  # that are looked at
_MANY = 10_000  # longer containers hold samples: they are put back, and what is in each sample is not
_LONGEST = 5_000_000  # of containers that are put back
_ARRAY, _ARRAYS = 1 << 24, 1 << 26  # bytes of one array, and of all: larger ones are the data themselves
_LIBRARIES = {*sys.stdlib_module_names, "torch", "lightning", "pytorch_lightning", "numpy", "hawq_lightning"}
_DATA = (Dataset, DataLoader, Sampler, SimpleNamespace, nn.Module)  # of libraries, and yet of the user's making
_C_VALUES: tuple[Any, ...] = (*ctypes.c_int.__bases__, ctypes.Array, ctypes.Structure)
_WORKERS = (Thread, BaseProcess, Executor)
_PLAIN = (type(None), int, float, str, list, dict, set)
_MISSING = object()


def data_of(trainer: Trainer) -> list[object]:
    """The data module, and the loaders that were given to the Trainer.

    Args:
        trainer: that fits or validates.
    """
    loops = (trainer.fit_loop, trainer.fit_loop.epoch_loop.val_loop, trainer.validate_loop)
    sources = [loop._data_source for loop in loops]
    given = [s.instance for s in sources if s.instance is not None and not s.is_module()]
    loaders = [x.iterables if isinstance(x, kinds("utilities.CombinedLoader")) else x for x in given]
    return [getattr(trainer, "datamodule", None), *loaders]


@contextmanager
def data_state_kept(
    *roots: object, network: nn.Module | None = None, unless: Callable[[], bool] = lambda: False
) -> Iterator[None]:
    """Put back what loaders, data modules and all that they hold have in attributes, closures and containers.

    Numbers, texts and other objects come back under their names, and new names go; lists, dicts, sets, small arrays and
    tensors, numbers that processes share, and random generators get their contents back. The data themselves, arrays
    of more than 16 MiB, are neither copied nor put back, nor is what works in the background.

    Args:
        roots: loaders, alone or in containers, and data modules.
        network: no part of it is put back, should a data set hold it.
        unless: asked at the end; what has moved stays so if this says yes.
    """
    state = _DataState(() if network is None else network.modules())
    for root in roots:
        state.note(root, 0)
    try:
        yield
    finally:
        if not unless():
            state.put_back()


class _DataState:
    def __init__(self, others: Iterable[object]) -> None:
        self._seen = {id(x) for x in others}
        self._others = (*kinds("LightningModule"), *kinds("Trainer"), *kinds("Callback"))
        self._put_back: list[PutBack] = []
        self._bytes = 0

    def put_back(self) -> None:
        """Everything as it was noted."""
        for put_back in reversed(self._put_back):
            put_back()

    def note(self, value: object, depth: int) -> None:
        """Remember what a value holds, and what is in it."""
        if value is None or id(value) in self._seen or depth > _DEPTH or len(self._seen) > _OBJECTS:
            return
        self._seen.add(id(value))
        for part in worth_a_look(self._parts(value)):
            self.note(part, depth + 1)

    def _parts(self, value: object) -> Iterable[object]:
        """Hold one object; gives what is in it."""
        if isinstance(value, (str, bytes, int, float, type, torch.jit.ScriptModule, *self._others)):
            return ()
        if isinstance(value, (torch.Tensor, np.ndarray, bytearray, array.array)):
            self._array(value)
        elif isinstance(value, SynchronizedBase):
            return (value.get_obj(),)
        elif isinstance(value, _C_VALUES):
            held = bytes(value)
            self._put_back.append(partial(ctypes.memmove, ctypes.addressof(value), held, len(held)))
        elif isinstance(value, (list, tuple, dict, set, deque)):
            if len(value) <= _LONGEST:
                self._add(contents_put_back(value))
            if len(value) <= _MANY and not isinstance(value, set):
                return value.values() if isinstance(value, dict) else value
        elif isinstance(value, functools.partial):
            return value.func, *value.args, value.keywords
        elif isinstance(value, MethodType):
            return (value.__self__,)
        elif isinstance(value, FunctionType):
            return self._function(value)
        elif (put_back := generator_put_back(value)) is not None:
            self._add(put_back)
        elif _of_users_making(value):
            return self._attributes(value)
        else:
            return list(getattr(value, "__dict__", {}).values())  # which may be generators
        return ()

    def _add(self, put_back: PutBack | None) -> None:
        if put_back is not None:
            self._put_back.append(put_back)

    def _array(self, value: torch.Tensor | np.ndarray | bytearray | array.array[float]) -> None:
        if isinstance(value, torch.Tensor) and (value.layout != torch.strided or value.is_nested):
            return
        size = value.nbytes if isinstance(value, (torch.Tensor, np.ndarray)) else len(memoryview(value).cast("B"))
        fixed = isinstance(value, np.memmap) or (isinstance(value, np.ndarray) and not value.flags.writeable)
        if fixed or size > _ARRAY or self._bytes + size > _ARRAYS:
            return
        self._bytes += size
        self._add(contents_put_back(value))

    def _function(self, value: FunctionType) -> Iterable[object]:
        self._add(dict_put_back(value.__dict__))
        cells = [(cell, _cell_contents(cell)) for cell in value.__closure__ or ()]
        self._put_back += [partial(_fill_cell, cell, held) for cell, held in cells]
        return *(held for _, held in cells), *(value.__defaults__ or ()), *value.__dict__.values()

    def _attributes(self, value: object) -> Iterable[object]:
        attributes: dict[str, object] = getattr(value, "__dict__", {})
        slots = {name: getattr(value, name) for name in _slots(type(value)) if hasattr(value, name)}
        held = [v for n, v in (attributes | slots).items() if n not in ("_parameters", "trainer")]
        if any(isinstance(v, _WORKERS) for v in held):
            return held
        self._add(dict_put_back(attributes))
        for name in _slots(type(value)):
            self._put_back.append(partial(_set, value, name, slots.get(name, _MISSING)))
        for kind in type(value).__mro__:  # counters of a class
            if _in_project(kind) and id(kind) not in self._seen:
                self._seen.add(id(kind))
                named = [(n, v) for n, v in vars(kind).items() if isinstance(v, _PLAIN) and not n.startswith("__")]
                self._put_back += [partial(_set, kind, n, v) for n, v in named]
                held += [v for _, v in named]
        return held


def _of_users_making(value: object) -> bool:
    return isinstance(value, (*_DATA, *kinds("LightningDataModule"))) or _in_project(type(value))


def _in_project(kind: type) -> bool:
    """Whether a class is of the user's own code: what packages hold, such as an image's open file, is theirs."""
    return _is_projects(str(kind.__module__))


@lru_cache(maxsize=1024)
def _is_projects(module: str) -> bool:
    file = getattr(sys.modules.get(module), "__file__", None) or ""
    return module.split(".")[0] not in _LIBRARIES and not {"site-packages", "dist-packages"} & {*Path(file).parts}


def _slots(kind: type) -> list[str]:
    """Names of all slots that instances of a class have, as their descriptors are called."""
    names = [(c, n) for c in kind.__mro__ if _in_project(c) for n in _listed(c.__dict__.get("__slots__", ()))]
    mangled = [f"_{c.__name__.lstrip('_')}{n}" if n[:2] == "__" != n[-2:] else n for c, n in names]
    return [n for n in mangled if n not in ("__dict__", "__weakref__")]


def _listed(slots: str | Iterable[str]) -> Iterable[str]:
    return (slots,) if isinstance(slots, str) else slots


def _set(owner: object, name: str, held: object) -> None:
    now = getattr(owner, name, _MISSING)
    if now is held:
        return
    if isinstance(owner, type):
        type.__setattr__(owner, name, held)
    elif held is _MISSING:
        object.__delattr__(owner, name)
    else:
        object.__setattr__(owner, name, held)  # frozen ones, too


def _cell_contents(cell: CellType) -> object:
    try:
        return cell.cell_contents
    except ValueError:  # empty
        return _MISSING


def _fill_cell(cell: CellType, held: object) -> None:
    if _cell_contents(cell) is held:
        return
    if held is _MISSING:
        del cell.cell_contents
    else:
        cell.cell_contents = held
