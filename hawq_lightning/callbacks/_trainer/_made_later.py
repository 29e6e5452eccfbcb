"""Is an attribute missing because training has not started yet, or because somebody made a mistake?"""

from __future__ import annotations

import dis
from collections.abc import Iterator
from types import CodeType

from torch import nn

_LIGHTNING = ("lightning", "lightning_fabric", "pytorch_lightning")


def made_later(error: AttributeError, module: nn.Module) -> bool:
    """Whether what is missing may be made by a hook that runs after ``on_fit_start``.

    An attribute of a module: only if some method of its classes, or of the step's, assigns it. Of ``None`` or of an
    object of Lightning's: it may. Of anything else, such as a batch: no.

    Args:
        error: raised by a step.
        module: of the step.
    """
    owner = error.obj
    if isinstance(owner, nn.Module):
        return any(error.name in _assigned(code) for m in (module, owner) for code in _methods(type(m)))
    return owner is None or _package(type(owner)) in _LIGHTNING


def _methods(kind: type) -> Iterator[CodeType]:
    for base in kind.__mro__:
        if _package(base) not in (*_LIGHTNING, "torch"):
            yield from (f.__code__ for f in vars(base).values() if hasattr(f, "__code__"))


def _package(kind: type) -> str:
    return kind.__module__.partition(".")[0]


def _assigned(code: CodeType) -> set[str]:
    return {i.argval for i in dis.get_instructions(code) if i.opname == "STORE_ATTR"}
