"""Methods that somebody has put other functions over, of one module (``layer.forward = ...``) or of a whole class.

Wrappers that keep a layer in float32, that pad in another way or move data between devices do so. What such a layer
computes is no longer what its class says.
"""

from __future__ import annotations

import copy
import functools
import sys
from collections.abc import Callable, Mapping
from types import CellType, FunctionType, MethodType
from typing import Any, TypeVar, cast
from weakref import WeakKeyDictionary

from torch import nn

from hawq_lightning.layers._adopted import HARMLESS
from hawq_lightning.layers._fake_quant import FakeQuantLayer, layer_type

_Model = TypeVar("_Model", bound=nn.Module)
_HELD = "_forward_put_there"  # where a fake-quant layer keeps it
_PATHS = 3  # the last parts of a file's path, which tell it wherever it was installed
_SHOWN: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()


def replaced(module: nn.Module, float_type: type[nn.Module]) -> list[str]:
    """Names of methods that are not those of its class any more.

    Args:
        module: float, or a fake-quant layer.
        float_type: of its kind.
    """
    own = {n: module.__dict__[n] for n in _methods(cast(Any, float_type)) if callable(module.__dict__.get(n))}
    names = [n for n, value in own.items() if not _is_that_of_class(value, module, n)]
    if own_forward(module) is not None:
        names.insert(0, "forward")
    return names + [n for n in ("forward", "_conv_forward") if _is_foreign(layer_type(module), n)]


def own_forward(module: nn.Module) -> Callable[..., object] | None:
    """What somebody has put in the place of this module's ``forward``; ``None``: nothing."""
    if isinstance(module, FakeQuantLayer):  # what is put there later calls the fake-quant layer's
        held = module.__dict__.get(_HELD)
        forward = held and held.forward
    else:
        forward = _SHOWN[module] if module in _SHOWN else module.__dict__.get("forward")
    return None if forward is None or _is_that_of_class(forward, module, "forward") else forward


def run_forward(module: nn.Module, *args: Any, **kwargs: Any) -> object:
    """The float module's ``forward``, its own where it has one."""
    own = own_forward(module)
    if own is not None:
        return own(*args, **kwargs)
    forward: Callable[..., object] = layer_type(module).forward
    return forward(module, *args, **kwargs)


def show_forward(module: nn.Module, forward: Callable[..., object]) -> None:
    """Put another ``forward`` there for a while; :func:`hide_forward` undoes it."""
    _SHOWN[module] = module.__dict__.get("forward")
    module.__dict__["forward"] = forward


def hide_forward(module: nn.Module) -> None:
    """What was there before :func:`show_forward`."""
    del module.__dict__["forward"]
    if (before := _SHOWN.pop(module)) is not None:
        module.__dict__["forward"] = before


def hold_forward(module: nn.Module) -> None:
    """Let a module be called by its class's ``forward``, which is about to be a fake-quant layer's."""
    if (forward := module.__dict__.pop("forward", None)) is not None:
        module.__dict__[_HELD] = _Held(forward)


def release_forward(module: nn.Module) -> None:
    """Undo :func:`hold_forward`."""
    if (held := module.__dict__.pop(_HELD, None)) is not None:
        module.__dict__["forward"] = held.forward


class _Held:
    """What was put in the place of a ``forward``; copies of the module have one that calls the copy."""

    def __init__(self, forward: Callable[..., object]) -> None:
        self.forward = forward

    def __deepcopy__(self, memo: dict[int, Any]) -> _Held:
        return _Held(_rebound(self.forward, memo))


def deep_copy(model: _Model, memo: dict[int, Any] | None = None) -> _Model:
    """A copy whose modules have copies of what was put in the place of their methods.

    Python copies no functions: one that is wrapped around a module's ``forward`` would still call the old module.

    Args:
        model: any.
        memo: as of :func:`copy.deepcopy`.
    """
    made = copy.deepcopy(model, memo)
    of = {id(old): new for old, new in zip(model.modules(), made.modules())}
    for new in of.values():
        for name, value in new.__dict__.items():
            if isinstance(value, (FunctionType, functools.partial)):
                new.__dict__[name] = _rebound(value, of)
    return made


@functools.lru_cache
def _methods(float_type: Any) -> tuple[str, ...]:
    """What a class computes with, its ``forward`` apart."""
    classes = [t for t in float_type.__mro__ if t not in (nn.Module, object)]
    names = {n for t in classes for n, value in vars(t).items() if isinstance(value, FunctionType)}
    return tuple(sorted(names - {"forward"} - HARMLESS))


def _is_that_of_class(value: object, module: nn.Module, name: str) -> bool:
    """Whether it is the bound method of the class, as it is after somebody has put it back."""
    bound = isinstance(value, MethodType) and value.__self__ is module
    return bound and cast(MethodType, value).__func__ is getattr(layer_type(module), name, None)


def _is_foreign(module_type: type, name: str) -> bool:
    """Whether the code of a method of torch's is from another file than its class."""
    owner = next((t for t in module_type.__mro__ if name in vars(t)), None)
    if owner is None or not owner.__module__.startswith("torch.nn.modules."):
        return False
    code = getattr(vars(owner)[name], "__code__", None)
    file = getattr(sys.modules.get(owner.__module__), "__file__", None)
    return code is None or (file is not None and _end(code.co_filename) != _end(file))


def _end(path: str) -> list[str]:
    return path.replace("\\", "/").split("/")[-_PATHS:]


def _rebound(value: Any, of: Mapping[int, Any]) -> Any:
    """The same function of the copied modules; the very same where it knows none of them."""
    if isinstance(value, MethodType):
        return MethodType(value.__func__, of[id(value.__self__)]) if id(value.__self__) in of else value
    if isinstance(value, functools.partial):
        keywords = {k: _rebound(x, of) for k, x in value.keywords.items()}
        return functools.partial(_rebound(value.func, of), *(_rebound(x, of) for x in value.args), **keywords)
    if not isinstance(value, FunctionType):
        return of.get(id(value), value)
    if id(value) in _BUSY:
        return value
    _BUSY.add(id(value))
    try:
        return _function_rebound(value, of)
    finally:
        _BUSY.discard(id(value))


_BUSY: set[int] = set()  # a function may know itself


def _function_rebound(function: FunctionType, of: Mapping[int, Any]) -> FunctionType:
    code, cells = function.__code__, function.__closure__ or ()
    # functions of a script know its names, those of another function its variables
    used: dict[str, Any] = {n: function.__globals__[n] for n in code.co_names if n in function.__globals__}
    held: dict[str, Any] = {n: c.cell_contents for n, c in zip(code.co_freevars, cells) if _full(c)}
    given = list(function.__defaults__ or ())
    names, inside = ({n: _rebound(x, of) for n, x in old.items()} for old in (used, held))
    defaults = [_rebound(x, of) for x in given]
    pairs = [*zip(names.values(), used.values()), *zip(inside.values(), held.values()), *zip(defaults, given)]
    if all(new is old for new, old in pairs):
        return function
    closure = tuple(CellType(inside[n]) if n in inside else c for n, c in zip(code.co_freevars, cells))
    made = FunctionType(code, {**function.__globals__, **names}, function.__name__, tuple(defaults) or None, closure)
    made.__kwdefaults__ = function.__kwdefaults__
    made.__dict__.update(function.__dict__)
    return made


def _full(cell: CellType) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:  # of a name that is not known yet
        return False
