"""What a batch holds, as a hash: tensors of every layout, arrays, containers, and objects of the user's own."""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import fields, is_dataclass
from types import BuiltinFunctionType, FunctionType, ModuleType

import numpy as np
import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from hawq_lightning._batches import parts_of
from hawq_lightning._tensor_sizes import sparse_parts
from hawq_lightning._types import Batch

_CONSTANTS = (int, float, str, complex, bytes)
_BY_NAME = (type, ModuleType, BuiltinFunctionType, FunctionType, weakref.ReferenceType)


class BatchKeys:
    """Keys that tell the batches of a set apart: by contents, and by object where contents cannot be read.

    Such objects (open files, locks, classes of extensions that cannot be pickled) are kept alive with the set.
    """

    def __init__(self) -> None:
        self._unread: dict[int, object] = {}

    def add(self, batch: Batch) -> str:
        """The key of a batch that is now one of the set."""
        return _digest(batch, self._unread)

    def of(self, batch: Batch) -> str:
        """The key of a batch; one that :meth:`add` never gave where the batch is not of the set."""
        return _digest(batch, dict(self._unread))

    @staticmethod
    def unread(batch: Batch) -> list[str]:
        """Names of the classes of all objects in a batch whose contents cannot be read."""
        found: dict[int, object] = {}
        _digest(batch, found)
        return sorted({type(value).__name__ for value in found.values()})


def batch_digest(batch: Batch) -> str:
    """A hash of all that a batch holds, on whatever device, the same in every process.

    Args:
        batch: any nesting of containers and objects; of those that cannot be read, such as open files, the class
            counts alone.
    """
    return _digest(batch, None)


def batches_digest(batches: Iterable[Batch]) -> str:
    """A hash of several batches, in their order, the same for as long as their data are.

    Args:
        batches: of any kind; of what is in objects of somebody's own, which may count and note, tensors and arrays
            alone.
    """
    digest = hashlib.sha256()
    for batch in batches:
        _Hasher(digest, None, data_alone=True).value(batch, ())
    return digest.hexdigest()[:32]


def hash_batch(batch: Batch, digest: hashlib._Hash) -> None:
    """Put all that a batch holds into a hash, as :func:`batch_digest` does.

    Args:
        batch: or any other value, such as what ``get_extra_state`` returns.
        digest: that grows.
    """
    _Hasher(digest, None).value(batch, ())


def hash_values(tensor: torch.Tensor, digest: hashlib._Hash) -> None:
    """Put the values of a tensor into a hash, without its type and, if it is strided, its shape.

    Args:
        tensor: of any layout, on any device; one on ``meta`` has no values.
        digest: that grows.
    """
    with torch.no_grad(), torch._C.DisableTorchFunction():  # reads only
        for part in _stored(tensor.detach()):
            digest.update(part)


def _digest(batch: Batch, unread: dict[int, object] | None) -> str:
    digest = hashlib.sha256()
    _Hasher(digest, unread).value(batch, ())
    return digest.hexdigest()


class _Hasher:
    """Goes through a value.

    Args:
        digest: that grows.
        unread: collects objects whose contents cannot be read, by their id, and tells them apart by it; ``None``: their
            class counts alone.
        data_alone: of what is in objects that are no containers, tensors and arrays count alone.
    """

    def __init__(self, digest: hashlib._Hash, unread: dict[int, object] | None, data_alone: bool = False) -> None:
        self._digest, self._unread = digest, unread
        self._data_alone, self._silent = data_alone, False

    def value(self, value: object, around: tuple[int, ...]) -> None:
        """Put a value into the hash; ``around``: ids of the objects that it lies in."""
        if id(value) in around:
            return
        if isinstance(value, torch.Tensor):
            self._text(f"{value.dtype} {tuple(value.shape)}" if not value.is_nested else f"{value.dtype} nested")
            hash_values(value, self._digest)
        elif isinstance(value, _CONSTANTS) or value is None:
            self._text(f"{type(value).__name__} {value!r}")
        elif isinstance(value, (np.ndarray, np.generic)):
            self._array(np.asarray(value), around)
        elif isinstance(value, _BY_NAME):
            self._named(value)
        elif isinstance(value, Set) and not is_dataclass(value):
            self._set(value, around)
        elif isinstance(value, (bytearray, memoryview)):
            self._text(f"{type(value).__name__} {bytes(value)!r}")
        else:
            self._object(value, (*around, id(value)))

    def _text(self, text: str) -> None:
        if not self._silent:
            self._digest.update(text.encode(errors="surrogatepass"))

    def _named(self, value: object) -> None:
        name = getattr(value, "__qualname__", type(value).__name__)
        self._text(f"{getattr(value, '__module__', '')} {name}")
        if isinstance(value, FunctionType) and ("<" in name):  # a lambda or closure: others have the same name
            self._opaque(value)

    def _array(self, array: np.ndarray, around: tuple[int, ...]) -> None:
        self._text(f"ndarray {array.dtype.descr if array.dtype.names else array.dtype} {array.shape}")
        if array.dtype.hasobject:
            self._all(array.flatten().tolist(), (*around, id(array)))
        else:
            self._digest.update(np.ascontiguousarray(array).tobytes())

    def _set(self, values: Set[object], around: tuple[int, ...]) -> None:
        hashed = []
        for value in values:  # in an order that other processes have as well
            inner = hashlib.sha256()
            _Hasher(inner, self._unread).value(value, around)
            hashed.append(inner.hexdigest())
        self._text(f"{type(values).__name__} {sorted(hashed)}")

    def _object(self, value: object, around: tuple[int, ...]) -> None:
        held = parts_of(value)
        keys: Sequence[object] = list(value) if isinstance(value, Mapping) else ""
        beside: list[object] = []
        own = False
        if held or isinstance(value, (Mapping, list, tuple)):
            beside = list(_more_attributes(value).values())
        else:
            own = True
            held, whole = _state(value)
            if not whole:
                self._opaque(value)
        plain = all(isinstance(key, _CONSTANTS) for key in keys)
        count = 0 if own and self._data_alone else len(held)
        self._text(f"{type(value).__name__} {count} {keys if plain else len(keys)}")
        if not plain:
            self._all(keys, around)
        before = self._silent
        self._silent = before or (self._data_alone and own)
        self._all(held, around)
        self._silent = before or (self._data_alone and bool(beside))
        self._all(beside, around)
        self._silent = before

    def _all(self, values: Iterable[object], around: tuple[int, ...]) -> None:
        for value in values:
            self.value(value, around)

    def _opaque(self, value: object) -> None:
        if self._unread is not None:
            self._unread[id(value)] = value
            self._text(f"object {id(value)}")


def _stored(tensor: torch.Tensor) -> Iterator[bytes | memoryview]:
    """The memory that a tensor's values fill, part by part."""
    layout, parts = tensor.layout, []
    if tensor.is_meta:
        return
    if tensor.is_nested:
        parts = list(tensor.unbind())
    elif tensor.is_quantized:
        parts = [tensor.int_repr(), tensor.dequantize()]
    elif layout != torch.strided:
        parts = sparse_parts(tensor) or [tensor.to_dense()]
    elif is_traceable_wrapper_subclass(tensor):
        names, _ = tensor.__tensor_flatten__()
        parts = [getattr(tensor, name) for name in names]
    else:
        plain = tensor.resolve_conj().resolve_neg().cpu().contiguous()
        yield plain.flatten().view(torch.uint8).numpy().data
        return
    yield f"{layout} {len(parts)}".encode()
    for part in parts:
        yield f"{part.dtype} {tuple(part.shape)}".encode()
        yield from _stored(part.detach())


def _more_attributes(container: object) -> Mapping[str, object]:
    """Attributes that a class of the user's own, made from a container or as a dataclass, has beside its parts."""
    attributes = getattr(container, "__dict__", {})
    known = {f.name for f in fields(container)} if is_dataclass(container) else set()
    return {name: value for name, value in attributes.items() if name not in known}


def _state(value: object) -> tuple[list[object], bool]:
    """What an object holds, and whether that is all: what pickle would write of it, or else its attributes."""
    attributes: dict[str, object] = getattr(value, "__dict__", {})
    try:
        reduced = value.__reduce_ex__(4)
    except Exception:  # whatever a class answers that cannot be pickled
        return list(attributes.values()), False
    if isinstance(reduced, str):
        return [reduced], True
    make, arguments, *more = reduced
    state, listed, named = (*more, None, None, None)[:3]
    if getattr(make, "__name__", "") == "__newobj__" and len(arguments) == 1 and (state is None or state is attributes):
        return list(attributes.values()), True
    return [make, *arguments, state, *(listed or ()), *(x for pair in named or () for x in pair)], True
