"""Lightning has two names, ``lightning.pytorch`` and ``pytorch_lightning``: one code in classes of two kinds.

The callbacks here work under either Trainer, which calls hooks by their names. Only what is asked for by its class has
to be known under both.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import Any

from lightning.pytorch.utilities.model_helpers import is_overridden

from hawq_lightning._errors import HawqError

_OURS = "lightning.pytorch"
_FABRIC = {_OURS: "lightning.fabric", "pytorch_lightning": "lightning_fabric"}


def kinds(path: str, fabric: bool = False) -> tuple[type[Any], ...]:
    """A class of Lightning under each name that the program has imported.

    Args:
        path: of the class within Lightning, such as ``callbacks.EarlyStopping``.
        fabric: of Lightning Fabric, which has two names too.
    """
    return tuple(
        found
        for name, fabric_name in _FABRIC.items()
        if name in sys.modules and (found := _named(fabric_name if fabric else name, path)) is not None
    )


def kind_beside(obj: object, path: str, fabric: bool = False) -> Any:
    """A class of Lightning under the name that an object is of.

    Args:
        obj: a Trainer, a module, a callback.
        path: as of :func:`kinds`.
        fabric: the same.
    """
    name = namespace_of(obj) or _OURS
    return _named(_FABRIC[name] if fabric else name, path)


def namespace_of(obj: object) -> str | None:
    """Under which name Lightning's own class is that an object is of, the first in the order of its bases."""
    for kind in type(obj).__mro__:
        for name in _FABRIC:
            if kind.__module__ == name or kind.__module__.startswith(f"{name}."):
                return name
    return None


def overrides(hook: str, owner: object) -> bool:
    """Whether a module or data module of either name has a hook of its own.

    Args:
        hook: its name.
        owner: whose.
    """
    bases = (*kinds("LightningModule"), *kinds("LightningDataModule"))
    base: Any = next((c for c in type(owner).__mro__ if c in bases), None)
    return is_overridden(hook, owner, parent=base)


def check_trainer(trainer: object) -> None:
    """Refuse what is not Lightning's.

    Raises:
        HawqError: the Trainer is neither ``lightning.pytorch``'s nor ``pytorch_lightning``'s.
    """
    if not isinstance(trainer, kinds("Trainer")):
        raise HawqError(
            f"HAWQ is a callback for Lightning's Trainer, and this is a {type(trainer).__qualname__} of "
            f"{type(trainer).__module__}."
        )


def _named(module: str, path: str) -> type[Any] | None:
    folder, _, name = path.rpartition(".")
    found: type[Any] | None = getattr(import_module(f"{module}.{folder}".rstrip(".")), name, None)
    return found
