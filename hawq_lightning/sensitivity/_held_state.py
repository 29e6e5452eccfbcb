"""What a loss moves of a model, put back: buffers are copied beforehand, parameters when they are written to."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from functools import partial
from typing import Self, TypeVar

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from hawq_lightning._types import FunctionInputs, Options

# ways to a tensor's memory through which it can be changed unseen; requires_grad_ changes no value
_DOORS = {"__setitem__", "numpy", "__array__", "__dlpack__", "data_ptr", "storage", "untyped_storage", "set_"}
_HARMLESS = {"requires_grad_", "retain_grad_"}
_Held = TypeVar("_Held")
_RENORMALISING = {"embedding", "embedding_bag"}  # with max_norm, their fourth argument


class HeldState:
    """Values of tensors, to be put back where they have changed.

    Args:
        tensors: of a model.
    """

    def __init__(self, tensors: Iterable[torch.Tensor]) -> None:
        self._held = [(t, t.data, t.detach().clone()) for t in tensors if _has_values(t)]

    def tensors(self) -> list[torch.Tensor]:
        """Those that are held."""
        return [t for t, _, _ in self._held]

    def values(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Those that fill their memory, with their values: of parts of a larger tensor it is not known which part."""
        return [(t, v) for t, data, v in self._held if _fills(data) and v.stride() == data.stride()]

    def changed(self) -> list[torch.Tensor]:
        """Tensors that are not what they were, changed in place or with ``tensor.data = ...``."""
        return [t for t, _, value in self._held if t.shape != value.shape or not torch.equal(t.detach(), value)]

    def keep_only(self, tensors: list[torch.Tensor]) -> None:
        """Forget the others."""
        ids = {id(t) for t in tensors}
        self._held = [entry for entry in self._held if id(entry[0]) in ids]

    def put_back(self) -> None:
        """Put back values, and the memory that held them; versions stay, so that graphs do not notice."""
        with torch.no_grad():
            for tensor, data, value in self._held:
                if tensor.data_ptr() != data.data_ptr():
                    tensor.data = data
                if not torch.equal(tensor.detach(), value):
                    tensor.data.copy_(value)


class HeldNames:
    """Which tensors modules hold under which names: a step may put others there, ``self.centre = 0.9 * self.centre``.

    Args:
        modules: of a model.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._put_back: list[Callable[[], None]] = []
        for module in modules:
            if isinstance(module, torch.jit.ScriptModule):
                continue  # it cannot name tensors anew
            self._put_back.append(partial(_names_again, module._buffers, dict(module._buffers)))
            self._put_back.append(partial(_names_again, module._parameters, dict(module._parameters)))

    def put_back(self) -> None:
        """The same tensors under the same names, in their order."""
        for put_back in self._put_back:
            put_back()


def _names_again(names: MutableMapping[str, _Held], held: Mapping[str, _Held]) -> None:
    if names.keys() != held.keys() or any(names[n] is not t for n, t in held.items()):
        names.clear()
        names.update(held)


_TO_PUT_BACK: list[list[KeptParameters]] = []


@contextmanager
def put_back_at_end() -> Iterator[None]:
    """Context at whose end all that was entered inside of it is put back."""
    _TO_PUT_BACK.append([])
    try:
        yield
    finally:
        for kept in _TO_PUT_BACK.pop():
            kept.put_back()
            if not any(kept in level for level in _TO_PUT_BACK):
                kept.check_unseen()
                kept.forget()


class KeptParameters(TorchFunctionMode):
    """Context in which a tensor is copied right before something writes to it; :meth:`put_back` undoes all that.

    Nearly every loss leaves the parameters alone, and a copy of them all would be the largest thing that a measurement
    holds besides the model. So calls of torch's functions are watched for those that write: in place by name
    (``mul_``, ``+=``, ``x[0] = ...``, ``torch._foreach_lerp_``), into ``out=``, by ``tensor.data = ...``, or by way of
    memory that is shared with NumPy. Tensors of wrapper classes (sharded ones) have no memory of their own and are
    copied beforehand.

    Args:
        tensors: of a model.
    """

    def __init__(self, tensors: Iterable[torch.Tensor]) -> None:
        super().__init__()
        self._tensors = [t for t in dict.fromkeys(tensors) if _has_values(t)]
        self._begin()

    def _begin(self) -> None:
        wrappers = [t for t in self._tensors if is_traceable_wrapper_subclass(t)]
        self._held = [HeldState(wrappers)] if wrappers else []
        # by memory: what is written to may be a view, `tensor.data`, or another parameter that is tied to this one
        self._free: dict[int, list[torch.Tensor]] = {}
        for tensor in self._tensors:
            if not is_traceable_wrapper_subclass(tensor):
                self._free.setdefault(memory_of(tensor), []).append(tensor)
        self._sums = self._checksums()

    def __enter__(self) -> Self:
        if _TO_PUT_BACK and self not in _TO_PUT_BACK[-1]:
            if not any(self in level for level in _TO_PUT_BACK):
                self._begin()
            _TO_PUT_BACK[-1].append(self)
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __torch_function__(
        self, func: Callable[..., object], types: object, args: FunctionInputs = (), kwargs: Options | None = None
    ) -> object:
        kwargs = kwargs or {}
        if self._free:
            self._keep(_written(func, args, kwargs))
        return func(*args, **kwargs)

    def put_back(self) -> None:
        """Values as they were before the first write."""
        for held in self._held:
            held.put_back()

    def forget(self) -> None:
        """Values that are back: before the next entry the tensors may be trained."""
        self._held = []

    @property
    def written(self) -> bool:
        """Whether anything was written to."""
        return bool(self._held)

    def owners(self) -> dict[int, torch.Tensor]:
        """Memory -> the tensor that fills it, of those that nothing has written to or that :meth:`value` knows."""
        free = {key: t for key, tensors in self._free.items() for t in tensors if _fills(t)}
        return free | {memory_of(t): t for held in self._held for t, _ in held.values()}

    def value(self, memory: int) -> torch.Tensor:
        """What the tensor that fills ``memory`` held before it was written to."""
        return next(v for held in self._held for t, v in held.values() if memory_of(t) == memory)

    def check_unseen(self) -> None:
        """Warn when something has written to a tensor past torch's functions, as extensions in C++ can."""
        now = self._checksums()
        changed = [key for key, sums in now.items() if not torch.equal(sums.nan_to_num(), self._sums[key].nan_to_num())]
        if changed:
            warnings.warn(
                f"HAWQ: {len(changed)} parameters (the first has the shape {list(changed[0].shape)}) were changed "
                "while measuring, by code that writes past torch's functions. They stay changed, and traces were "
                "measured with what they were changed to.",
                stacklevel=2,
            )

    def _checksums(self) -> dict[torch.Tensor, torch.Tensor]:
        with torch.no_grad(), torch._C.DisableTorchFunction():
            return {
                t: torch.stack([t.sum(dtype=torch.float64), torch.linalg.vector_norm(t, dtype=torch.float64)])
                for tensors in self._free.values() for t in tensors if t.is_floating_point()
            }  # fmt: skip

    def _keep(self, written: object) -> None:
        for tensor in _tensors(written):
            if is_traceable_wrapper_subclass(tensor) or tensor.is_meta:
                continue
            if tensors := self._free.pop(memory_of(tensor), None):
                with torch._C.DisableTorchFunction():
                    self._held.append(HeldState(tensors))


def _written(func: Callable[..., object], args: FunctionInputs, kwargs: Options) -> object:
    """What a call of one of torch's functions writes to, or may."""
    name = getattr(func, "__name__", "")
    if name in _RENORMALISING:  # functional forms write inside, where no call is seen
        return (*args[:2], kwargs.get("weight")) if args[3:4] or kwargs.get("max_norm") else ()
    out = (kwargs.get("out"),)
    if kwargs.get("inplace") or _writes_first(func, name):
        return (args[:1] or tuple(kwargs.values()), out)
    return out


def _writes_first(func: Callable[..., object], name: str) -> bool:
    if name == "__set__":  # of a property: tensor.data, tensor.grad
        return getattr(getattr(func, "__self__", None), "__name__", "") == "data"
    in_place = name.endswith("_") and not name.endswith("__") and name not in _HARMLESS
    return in_place or name in _DOORS or (name.startswith("__i") and name not in ("__init__", "__index__", "__int__"))


def _tensors(value: object) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from _tensors(part)


def _fills(tensor: torch.Tensor) -> bool:
    return bool(tensor.storage_offset() == 0)


def memory_of(tensor: torch.Tensor) -> int:
    """Where a tensor's memory begins; views of one tensor share it.

    Raises:
        NotImplementedError: the tensor is sparse.
    """
    with torch._C.DisableTorchFunction():  # a context of this kind around this one would take it for a write
        return tensor.untyped_storage().data_ptr()


def _has_values(tensor: torch.Tensor) -> bool:
    lazy = isinstance(tensor, (nn.UninitializedParameter, nn.UninitializedBuffer))
    return not tensor.is_meta and not lazy and tensor.layout == torch.strided  # a graph's sparse matrix stays as it is
