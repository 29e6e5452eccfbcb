"""Results of functions in a module's forward by name, as readers of activations beside those of layers.

``layer1.0:add`` is what the first addition in the forward of ``layer1.0`` gives, ``layer1.0:add_1`` what the second
does; ``layer1.0.bn2:output`` what a layer or norm gives, and ``layer1.0:add[1]`` what the first addition reads as its
second operand. Functions of torch's own modules without parameters, such as ``nn.ReLU``, count as those of the module
around, unless that is a ``Sequential``: one ReLU that a block calls three times gives three results. Counts begin anew
at every call of the module.
"""

from __future__ import annotations

import functools
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.hooks import RemovableHandle

from hawq_lightning._types import Options
from hawq_lightning.layers._attention_products import OPERANDS, forget_products, leave_modes
from hawq_lightning.layers._held import HeldQuantizers, ResultQuantizers
from hawq_lightning.layers._kind import find_kind
from hawq_lightning.layers._operands import OperandReader

RESULTS = "result_quantizers"
BIAS = "integer_bias"
OUTPUT = "output"
"""What a layer or a norm gives."""
_SAME = {"concat": "cat", "concatenate": "cat", "multiply": "mul"}
_OPERATORS = {"add", "mul", "sub", "truediv", "floordiv", "matmul", "pow", "mod"}

_Function = Callable[..., Any]
Visit = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class ReadTensor:
    """A tensor as it was when something read it."""

    tensor: torch.Tensor
    version: int


class Listener(Protocol):
    """Is told of everything that is called while it listens, in order."""

    def function(
        self, module: nn.Module, label: str, name: str, read: Sequence[ReadTensor], given: Any, options: Options
    ) -> Any:
        """What a function gave for ``options["args"]`` and ``options["kwargs"]``; returns it, or the like.

        Args:
            module: whose forward called it.
            label: of the result.
            name: of the function.
            read: tensors among the arguments.
            given: the result.
            options: the arguments.
        """
        ...

    def layer(self, module: nn.Module, read: Sequence[object], output: object) -> None:
        """A layer or norm was called."""
        ...

    def given(self, output: object) -> None:
        """What the outermost module gave."""
        ...


@dataclass
class _Frame:
    module: nn.Module
    closed: bool  # one operation: its functions have no names
    counts: dict[str, int] = field(default_factory=dict)


class _Now(threading.local):
    def __init__(self) -> None:
        self.frames: list[_Frame] = []
        self.mode: _Results | None = None
        self.listener: Listener | None = None


_NOW = _Now()
_VISITS: weakref.WeakKeyDictionary[nn.Module, list[tuple[str, Visit]]] = weakref.WeakKeyDictionary()


def results_of(module: nn.Module) -> ResultQuantizers | None:
    """The quantizers of a module's results, if it has some."""
    held = None if isinstance(module, torch.jit.ScriptModule) else module._modules.get(RESULTS)
    return held if isinstance(held, ResultQuantizers) else None


def is_result(name: str) -> bool:
    """Whether a name stands for a result, where layers have theirs; operands of attention have such names, too."""
    _, mark, label = name.rpartition(":")
    return bool(mark) and label not in OPERANDS


@dataclass(frozen=True, eq=False)
class ResultReader(OperandReader):
    """A result that is read by a quantizer where it is made.

    Attributes:
        around: the whole model.
    """

    around: nn.Module

    def on_read(self, visit: Visit) -> RemovableHandle:
        """Show the result each time that it is made; ``visit`` may return another."""
        return _Visited(self, visit)  # type: ignore[return-value]


class _Visited:
    def __init__(self, reader: ResultReader, visit: Visit) -> None:
        self._module, self._entry, self._follow = reader.module, (reader.operand, visit), Following(reader.around)
        _VISITS.setdefault(self._module, []).append(self._entry)

    def remove(self) -> None:
        """Detach."""
        entries = _VISITS.get(self._module, [])
        if self._entry in entries:
            entries.remove(self._entry)
        self._follow.remove()


class Following:
    """Follows the forward of a module and of all in it, until it is removed; results have names meanwhile.

    Args:
        root: any module.
        listener: is told of all that is called by this thread.
    """

    def __init__(self, root: nn.Module, listener: Listener | None = None) -> None:
        self._modules = [m for m in _owners(root) if not _followed(m)]
        self._listener = listener
        for module in self._modules:
            follow(module)
        if listener is not None:
            _NOW.listener = listener

    def remove(self) -> None:
        """Leave the modules as they were."""
        for module in self._modules:
            unfollow(module)
        if self._listener is not None:
            _NOW.listener = None


def follow_all(root: nn.Module) -> None:
    """Let the results in a module have names for good."""
    for module in _owners(root):
        if not _followed(module):
            follow(module)


def _owners(root: nn.Module) -> list[nn.Module]:
    """Modules whose functions have names of their own: of a ReLU, only where a ``Sequential`` alone holds it."""
    places = Counter(id(child) for m in root.modules() for child in m.children())
    listed = {id(child) for m in root.modules() if isinstance(m, nn.Sequential) for child in m.children()}
    return [
        m for m in root.modules()
        if not _is_quantizer(m) and not (_is_transparent(m) and (id(m) not in listed or places[id(m)] > 1))
    ]  # fmt: skip


def unfollow_all(root: nn.Module) -> None:
    """Undo :func:`follow_all`."""
    for module in root.modules():
        unfollow(module)


def follow(module: nn.Module) -> None:
    """Enter and leave with the module."""
    module.register_forward_pre_hook(_enter_closed if is_closed(module) else _enter)
    module.register_forward_hook(_leave, always_call=True)


def unfollow(module: nn.Module) -> None:
    """Undo :func:`follow`."""
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        for key in [k for k, hook in hooks.items() if hook in (_enter, _enter_closed, _leave)]:
            del hooks[key]
            module._forward_hooks_always_called.pop(key, None)


def _followed(module: nn.Module) -> bool:
    return any(hook in (_enter, _enter_closed) for hook in module._forward_pre_hooks.values())


def _is_quantizer(module: nn.Module) -> bool:
    """They run where their layer is closed already."""
    return isinstance(module, HeldQuantizers) or hasattr(module, "fake_quant_disabled")


def _is_transparent(module: nn.Module) -> bool:
    """Whether what its forward calls counts as called by the module around."""
    plain = type(module).__module__.startswith("torch.nn.modules.") and next(module.children(), None) is None
    stateless = next(module.parameters(), None) is None and next(module.buffers(), None) is None
    return plain and stateless and not isinstance(module, nn.modules.dropout._DropoutNd)


def is_closed(module: nn.Module) -> bool:
    """Whether a module is one operation: a layer, or a norm."""
    if isinstance(module, nn.modules.batchnorm._NormBase) or type(module).__name__ == "FrozenBatchNorm2d":
        return True
    kind = find_kind(module)
    return kind is not None and not (kind.by_contents and next(module.children(), None) is not None)


# these run as they are written inside of what is compiled, which would not know of the mode
@torch.compiler.disable  # type: ignore[untyped-decorator]
def _enter(module: nn.Module, args: object, closed: bool = False) -> None:
    _NOW.frames.append(_Frame(module, closed))
    if _NOW.mode is None:
        _NOW.mode = _Results()
        _NOW.mode.__enter__()  # type: ignore[no-untyped-call]


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _enter_closed(module: nn.Module, args: object) -> None:
    _enter(module, args, closed=True)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _leave(module: nn.Module, args: Sequence[object], output: object) -> object:
    frames = _NOW.frames
    if not frames:
        return None
    closed, frames[-1].closed = frames[-1].closed, True
    given = output
    try:
        if isinstance(given, torch.Tensor):
            if (bias := module._modules.get(BIAS)) is not None and _NOW.listener is None:
                given = bias(given)
            if closed and _NOW.listener is not None:
                _NOW.listener.layer(module, args, given)
            elif closed:
                given = _seen(module, OUTPUT, given)
    finally:
        frames.pop()
        if not frames and _NOW.mode is not None:
            _NOW.mode.__exit__(None, None, None)  # type: ignore[no-untyped-call]
            _NOW.mode = None
    if not frames and _NOW.listener is not None:
        _NOW.listener.given(given)
    return None if given is output else given


def forget_calls() -> None:
    """Leave modules whose forward was cut off by an exception that hooks are not told of (``BaseException``)."""
    forget_products()
    _NOW.frames.clear()
    if _NOW.mode is not None:
        leave_modes([_NOW.mode])
        _NOW.mode = None


def _seen(module: nn.Module, label: str, x: Any) -> Any:
    """What a result is read as: by visitors, and by its quantizer."""
    if not isinstance(x, torch.Tensor) or not x.is_floating_point() or _NOW.listener is not None:
        return x  # whoever listens follows tensors, which quantizers make anew
    for name, visit in list(_VISITS.get(module, ())):
        x = visit(x) if name == label else x
    holder = results_of(module)
    return holder[label](x) if holder is not None and label in holder else x


class _Results(TorchFunctionMode):
    """Gives the results of functions names while modules run."""

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __torch_function__(
        self, func: _Function, types: object, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        frame = _NOW.frames[-1] if _NOW.frames else None
        if frame is None or frame.closed:
            return func(*args, **kwargs)
        name = function_name(func)
        if not name:
            return func(*args, **kwargs)
        count = frame.counts.get(name, 0)
        frame.counts[name] = count + 1
        label = f"{name}_{count}" if count else name
        module, listener = frame.module, _NOW.listener
        wanted = _wanted(module)
        if listener is None and not any(w == label or w.startswith((f"{label}[", f"{label}_sig")) for w in wanted):
            return func(*args, **kwargs)
        flat, form = tree_flatten((tuple(args), kwargs))
        tensors = [i for i, x in enumerate(flat) if isinstance(x, torch.Tensor)]
        for order, at in enumerate(tensors):
            flat[at] = _seen(module, f"{label}[{order}]", flat[at]) if f"{label}[{order}]" in wanted else flat[at]
        if name == "silu":
            return self._silu(module, label, flat[tensors[0]], listener)
        args, kwargs = tree_unflatten(flat, form)
        read = [flat[at] for at in tensors]
        keys = _keys(read)
        out = func(*args, **kwargs)
        if listener is not None:
            out = listener.function(module, label, name, keys, out, {"args": args, "kwargs": kwargs})
        return _seen(module, label, out)

    def _silu(self, module: nn.Module, label: str, x: torch.Tensor, listener: Listener | None) -> Any:
        """``x sigmoid(x)``, whose factor integer kernels keep as codes."""
        keys = _keys([x])
        gate: Any = torch.sigmoid(x)
        if listener is not None:
            gate = listener.function(module, f"{label}_sigmoid", "sigmoid", keys, gate, {"args": (x,), "kwargs": {}})
        gate = _seen(module, f"{label}_sigmoid", gate)
        both, out = _keys([x, gate]), x * gate
        if listener is not None:
            out = listener.function(module, label, "mul", both, out, {"args": (x, gate), "kwargs": {}})
        return _seen(module, label, out)


def _keys(tensors: Sequence[torch.Tensor]) -> list[ReadTensor]:
    return [ReadTensor(t, 0 if t.is_inference() else t._version) for t in tensors]


def _wanted(module: nn.Module) -> set[str]:
    holder = results_of(module)
    return {*(holder or ()), *(name for name, _ in _VISITS.get(module, ()))}


@functools.lru_cache(maxsize=4096)
def function_name(func: _Function) -> str:
    """What a function's results are called: operators, methods and in-place forms alike; nothing of attributes."""
    raw = getattr(func, "__name__", "")
    if raw in ("__get__", "__set__"):
        return "get" if raw == "__get__" else ""
    name = raw.strip("_")
    if raw.startswith("__") and name[:1] in "ir" and name[1:] in _OPERATORS:
        name = name[1:]
    return _SAME.get(name, name)
