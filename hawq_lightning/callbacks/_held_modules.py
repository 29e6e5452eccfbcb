"""Modules that are no part of a LightningModule, and yet held by it or by a callback: averages, targets, teachers."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import FunctionType, MethodType

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from hawq_lightning._plan import Plan
from hawq_lightning.callbacks._trainer import is_sharded
from hawq_lightning.quantization import NetworkCopies
from hawq_lightning.sensitivity import of_library, plain_attributes

_METRICS = "torchmetrics"
_DEPTH = 4


class FollowedCopies:
    """Averages and targets of the network, inside of the module or held beside it, quantized as the network is."""

    def __init__(self) -> None:
        self._copies, self._globals = NetworkCopies(), NetworkCopies(tell=_warn)
        self._plan: Plan | None = None

    def follow(self, trainer: Trainer, pl_module: LightningModule, plan: Plan | None, thorough: bool = True) -> None:
        """Give copies whose weights have moved the network's quantizers; the plan's are looked for once.

        Args:
            trainer: of the module.
            pl_module: quantized.
            plan: in force; ``None``: the network is float.
            thorough: whatever it costs.
        """
        if plan is None or is_sharded(trainer):
            return
        if plan is not self._plan:
            self._plan = plan
            beside = modules_beside(trainer, pl_module)
            self._copies.find(pl_module, plan, beside)
            known = {id(m) for root in (pl_module, *beside) for m in root.modules()}
            self._globals.find(pl_module, plan, [m for m in _global_modules(pl_module) if id(m) not in known])
        self._copies.follow(thorough)
        self._globals.follow()


def _warn(copy: nn.Module) -> None:
    rank_zero_warn(
        f"HAWQ: a global variable holds a copy of the network ({type(copy).__name__}) that follows its weights, and "
        "stays float: hold it as an attribute of the LightningModule or of a callback, so that it is quantized as well."
    )


def _global_modules(pl_module: LightningModule) -> list[nn.Module]:
    """Modules in global variables, also in lists and dicts, of the files that the module's classes come from."""
    names = {t.__module__ for t in type(pl_module).__mro__ if not issubclass(LightningModule, t)}
    values = [v for name in sorted(names) if name in sys.modules for v in [*vars(sys.modules[name]).values()]]
    values += [p for v in values if isinstance(v, (list, tuple, dict)) for p in _parts(v)]
    return [v for v in values if isinstance(v, nn.Module)]


def modules_beside(trainer: Trainer, pl_module: LightningModule) -> list[nn.Module]:
    """Modules in attributes of the module, of its parts and of the Trainer's callbacks, that are no submodules of it.

    Args:
        trainer: with callbacks; Lightning's and this package's own look after themselves.
        pl_module: the user's.
    """
    inside = {id(m) for m in pl_module.modules()}
    found: dict[int, nn.Module] = {}
    seen: set[int] = set()

    def look(value: object, depth: int) -> None:
        if depth > _DEPTH or id(value) in seen or id(value) in inside:
            return
        seen.add(id(value))
        if isinstance(value, nn.Module):
            found.setdefault(id(value), value)
            return
        for part in _parts(value):
            look(part, depth + 1)

    for module in pl_module.modules():
        for value in plain_attributes(module).values():
            look(value, 1)
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if not of_library(callback, _METRICS):
            look(callback, 0)
    return list(found.values())


def _parts(value: object) -> Iterator[object]:
    if isinstance(value, dict):
        yield from value.values()
    elif isinstance(value, (list, tuple, set)):
        yield from value
    elif not isinstance(value, (type, FunctionType, MethodType)) and not of_library(value, _METRICS):
        yield from getattr(value, "__dict__", {}).values()
