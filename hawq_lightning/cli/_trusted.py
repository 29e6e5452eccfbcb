"""A run folder's settings are somebody's data: what their ``_target_`` entries may name."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from types import FunctionType, ModuleType

from lightning.pytorch import LightningDataModule
from omegaconf import OmegaConf
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import Dataset

from hawq_lightning._errors import HawqError

_PACKAGES = ("hawq_lightning", "torch", "torchvision")
_OF_NETWORKS = ("hawq_lightning", "torchvision")
_BUILDERS = ("hawq_lightning.models", "torchvision.models")  # whose functions make networks
_PLAIN = ("torchvision.transforms",)  # whose classes do nothing but compute


def check_targets(settings: object, named: set[str], folder: Path) -> None:
    """Refuse code that is no network, optimizer or data of this package, torch or torchvision, nor named by the user.

    A path through a module (``torch.os.system``) leads out of these packages, so the object itself is looked at.

    Args:
        settings: of a network or of data.
        named: modules of the command line; what they hold may be called.
        folder: of the run, for the message.

    Raises:
        HawqError: the first that is not allowed.
    """
    # resolved: an interpolation can make a whole node
    for target in _targets(OmegaConf.to_container(settings, resolve=True)):
        if any(target.startswith(f"{module}.") for module in named):
            continue
        if not _is_harmless(target):
            module = target.rpartition(".")[0] or target
            raise HawqError(
                f"The run at {folder} wants to call {target}. A run folder is data and runs no code: if you trust it, "
                f"name its module, imports=[{module}]."
            )


def _targets(content: object) -> Iterator[str]:
    if isinstance(content, dict):
        for key, value in content.items():
            if key == "_target_":
                yield str(value)
            yield from _targets(value)
    elif isinstance(content, list):
        for value in content:
            yield from _targets(value)


def _is_harmless(target: str) -> bool:
    first, *rest = target.split(".")
    if first not in _PACKAGES:
        return False
    try:
        found: object = importlib.import_module(first)
    except ImportError:
        return False
    path = first
    for name in rest:
        path = f"{path}.{name}"
        if not isinstance(found, ModuleType) or not _inside(found.__name__, _PACKAGES):
            return False
        if not hasattr(found, name):
            try:
                importlib.import_module(path)
            except ImportError:
                return False
        found = getattr(found, name)
    origin = getattr(found, "__module__", None) or ""
    if isinstance(found, type):
        computes = issubclass(found, nn.Module) and _inside(origin, ("torch.nn", *_OF_NETWORKS))
        trains = issubclass(found, (Optimizer, LRScheduler)) and _inside(origin, ("torch.optim",))
        reads = issubclass(found, (LightningDataModule, Dataset)) and _inside(origin, _OF_NETWORKS)
        return computes or trains or reads or _inside(origin, _PLAIN)
    # require imports whatever it is told to
    return isinstance(found, FunctionType) and _inside(origin, _BUILDERS) and found.__name__ != "require"


def _inside(name: str, packages: tuple[str, ...]) -> bool:
    return any(name == p or name.startswith(f"{p}.") for p in packages)
