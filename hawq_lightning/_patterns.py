"""Patterns that pick layers of a model, and the names that they are matched against."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Sequence

from torch import nn

from hawq_lightning.layers import layer_type

WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module")  # parts of names that torch.compile and FSDP add
Pattern = str | type[nn.Module] | Callable[[str, nn.Module], bool]
Patterns = Pattern | Sequence[Pattern] | None


def named_modules(model: nn.Module) -> Iterable[tuple[str, nn.Module]]:
    """Every module by its name."""
    # a compiled or sharded wrapper is the same module under a longer name
    for name, module in model.named_modules():
        yield ".".join(part for part in name.split(".") if part not in WRAPPERS), module


def plain_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Every module under all of its names, without what wrappers add to them."""
    modules = model.named_modules(remove_duplicate=False)
    return {".".join(p for p in name.split(".") if p not in WRAPPERS): m for name, m in modules}


def as_list(patterns: Patterns) -> list[Pattern]:
    """Patterns of any form, one by one."""
    if patterns is None:
        return []
    return list(patterns) if isinstance(patterns, Sequence) and not isinstance(patterns, str) else [patterns]


def matches(pattern: Pattern, name: str, module: nn.Module) -> bool:
    """Whether a pattern picks a module of this name."""
    if isinstance(pattern, str):
        return fnmatch.fnmatchcase(name, pattern) or pattern == layer_type(module).__name__
    if isinstance(pattern, type):
        return issubclass(layer_type(module), pattern)
    return bool(pattern(name, module))
