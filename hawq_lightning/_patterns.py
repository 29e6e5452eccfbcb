"""Patterns that pick layers of a model, and the names that they are matched against."""

from __future__ import annotations

import fnmatch
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from collections.abc import Set as AnySet
from typing import Any, cast

from torch import nn

from hawq_lightning._errors import HawqError
from hawq_lightning.layers import layer_type

WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module")  # parts of names that torch.compile and FSDP add
Pattern = str | type[nn.Module] | Callable[[str, nn.Module], bool]
Patterns = Pattern | Iterable[Pattern] | None

_FORMS = "a glob on layer names such as 'net.4', a layer type such as nn.Embedding, or f(name, module) -> bool"


def named_modules(model: nn.Module) -> Iterable[tuple[str, nn.Module]]:
    """Every module by its name."""
    # a compiled or sharded wrapper is the same module under a longer name
    for name, module in model.named_modules():
        yield ".".join(part for part in name.split(".") if part not in WRAPPERS), module


def plain_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Every module under all of its names, without what wrappers add to them."""
    modules = model.named_modules(remove_duplicate=False)
    return {".".join(p for p in name.split(".") if p not in WRAPPERS): m for name, m in modules}


def as_list(patterns: object, field: str = "patterns") -> list[Pattern]:
    """Patterns of any form, one by one.

    Args:
        patterns: one, or an iterable of several such as a list, a set or a generator; ``None``: there is none.
        field: what the user called them, for messages.

    Raises:
        HawqError: one of them is no pattern.
    """
    if patterns is None:
        return []
    several = isinstance(patterns, Iterable) and not isinstance(patterns, (str, bytes, type, Mapping, nn.Module))
    found: list[Any] = list(cast(Iterable[object], patterns)) if several else [patterns]
    for pattern in found:
        if why := _no_pattern(pattern):
            raise HawqError(f"{field} holds {pattern!r}, {why}; a pattern is {_FORMS}, and several may be in a list.")
    return sorted(found, key=str) if isinstance(patterns, AnySet) else found


def own_exclude(module: nn.Module, prefix: str = "") -> list[Pattern]:
    """Patterns in a module's attribute ``quantization_exclude``.

    Args:
        module: that may have it.
        prefix: of the module's name and a dot, where the patterns are for one around it.

    Raises:
        HawqError: it holds no patterns.
    """
    given = getattr(module, "quantization_exclude", None)
    field = f"{type(module).__name__}.quantization_exclude"
    if inspect.ismethod(given) and _takes(given, 0) and not _takes(given, 2):
        raise HawqError(f"{field} is a method; write @property above it, or make it an attribute of patterns.")
    if isinstance(given, Iterator) and inspect.getattr_static(module, "quantization_exclude") is given:
        raise HawqError(f"{field} is a {type(given).__name__}, which gives its patterns once; make it a list.")
    return [_under(prefix, pattern) for pattern in as_list(given, field)] if prefix else as_list(given, field)


def _under(prefix: str, pattern: Pattern) -> Pattern:
    if isinstance(pattern, type):
        return pattern
    if isinstance(pattern, str):
        return f"{prefix}{pattern}"

    def inside(name: str, module: nn.Module) -> bool:
        return name.startswith(prefix) and bool(pattern(name.removeprefix(prefix), module))

    return inside


def _no_pattern(pattern: object) -> str:
    """Why something is none; empty if it is one."""
    if isinstance(pattern, (str, type)):
        return ""
    if isinstance(pattern, nn.Module):
        return "a module and not its name"
    if callable(pattern):
        return "" if _takes(pattern, 2) else "which does not take (name, module)"
    return f"which is of type {type(pattern).__name__}"


def _takes(function: Callable[..., object], count: int) -> bool:
    try:
        inspect.signature(function).bind(*[""] * count)
    except TypeError:
        return False
    except ValueError:  # of a builtin nothing is known
        return True
    return True


def matches(pattern: Pattern, name: str, module: nn.Module) -> bool:
    """Whether a pattern picks a module of this name."""
    if isinstance(pattern, str):
        return fnmatch.fnmatchcase(name, pattern) or pattern == layer_type(module).__name__
    if isinstance(pattern, type):
        return issubclass(layer_type(module), pattern)
    return bool(pattern(name, module))
