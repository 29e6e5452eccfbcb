"""Logging while a step is lent out: loggers that tell what the Trainer's tell and write nothing, and values."""

from __future__ import annotations

import copy
import os
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch.utils._python_dispatch import _disable_current_modes
from torchmetrics import Metric, MetricCollection

from hawq_lightning._types import Options

_PLAIN = (str, bytes, int, float, complex, type(None), os.PathLike, torch.device, torch.dtype)
_UNKNOWN = object()
_VALUES = ("callback_metrics", "logged_metrics", "progress_bar_metrics")


class Silent:
    """Takes every call and keeps nothing.

    In the place of an object it has that object's class for ``isinstance``, and its names, numbers, paths and
    containers of these. Whatever else it has, and whatever a call returns, is silent as well.

    Args:
        of: the object; nothing is known of what calls return.
    """

    def __init__(self, of: object = _UNKNOWN) -> None:
        self.__of = of

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return type(self) if self.__of is _UNKNOWN or callable(self.__of) else type(self.__of)

    def __getattr__(self, name: str) -> Any:
        if self.__of is _UNKNOWN:
            if name.startswith("__"):
                raise AttributeError(name)
            return Silent()
        value = getattr(self.__of, name)  # what is missing there is missing here
        return copy.deepcopy(value) if _is_plain(value) else Silent(value)

    def __getitem__(self, key: object) -> Any:
        if isinstance(self.__of, Mapping) and key in self.__of and _is_plain(self.__of[key]):
            return copy.deepcopy(self.__of[key])
        return Silent()

    def __setitem__(self, key: object, value: object) -> None: ...

    def __delitem__(self, key: object) -> None: ...

    def __call__(self, *args: object, **kwargs: object) -> Silent:
        return Silent()

    def __iter__(self) -> Iterator[object]:
        return iter(())  # by __getitem__ it would never end

    def __enter__(self) -> Silent:
        return Silent()

    def __exit__(self, *args: object) -> None: ...

    def __deepcopy__(self, memo: Options) -> Silent:
        return self


@contextmanager
def silent_logging(trainer: Trainer, pl_module: LightningModule) -> Iterator[Callable[[], None]]:
    """Nothing is written or sent by ``self.log``, loggers and their experiments; yields what forgets logged values.

    The Trainer has as many loggers as before, each a :class:`Silent` one, also where a module keeps one of them. What a
    step logs is in ``trainer.callback_metrics``, ``logged_metrics`` and ``progress_bar_metrics`` until it is forgotten.
    Loggers and values are put back; attributes of modules are left to the caller.
    """
    loggers = trainer.loggers
    known = {name: dict(getattr(trainer, name)) for name in _VALUES}

    def forget() -> None:
        for name, values in known.items():
            current = getattr(trainer, name)
            if current.keys() != values.keys() or any(current[k] is not v for k, v in values.items()):
                current.clear()
                current.update(values)

    # functions, not methods of an object: a copy of the module would copy the Trainer with it
    def log(
        name: str,
        value: object,
        prog_bar: bool = False,
        logger: bool | None = None,
        on_step: bool | None = None,
        on_epoch: bool | None = None,
        *args: object,
        **kwargs: object,
    ) -> None:
        scalar = _scalar(value, pl_module.device)
        if on_step is False or scalar is None:
            return  # known at the end of an epoch
        told = f"{name}_step" if on_epoch else name
        trainer.callback_metrics.update({name: scalar, told: scalar})
        if logger is not False:
            trainer.logged_metrics[told] = scalar
        if prog_bar:
            trainer.progress_bar_metrics[told] = scalar  # type: ignore[assignment]  # no wait for the device

    def log_dict(dictionary: Mapping[str, object] | MetricCollection, *args: Any, **kwargs: Any) -> None:
        how: dict[str, Any] = {"copy_state": False} if isinstance(dictionary, MetricCollection) else {}
        for name, value in dictionary.items(**how):
            log(name, value, *args, **kwargs)

    silent = {id(x): Silent(x) for x in loggers}
    try:
        trainer.loggers = [silent[id(x)] for x in loggers]  # type: ignore[misc]
        for module in pl_module.modules():
            for name, value in vars(module).items():
                if id(value) in silent:
                    module.__dict__[name] = silent[id(value)]
        pl_module.__dict__.update(log=log, log_dict=log_dict)
        yield forget
    finally:
        for name in ("log", "log_dict"):
            pl_module.__dict__.pop(name, None)
        trainer.loggers = loggers
        forget()


def _is_plain(value: object) -> bool:
    if isinstance(value, Mapping):
        return all(_is_plain(k) and _is_plain(v) for k, v in value.items())
    if isinstance(value, Namespace):
        return _is_plain(vars(value))
    if isinstance(value, (list, tuple, set, frozenset)):
        return all(map(_is_plain, value))
    return isinstance(value, _PLAIN)


def _scalar(value: object, device: torch.device) -> torch.Tensor | None:
    """What Lightning would make of a logged value; ``None``: it holds no single number."""
    value = value._forward_cache if isinstance(value, Metric) else value
    with torch._C.DisableTorchFunction(), _disable_current_modes():  # whoever watches the loss does not see this
        if isinstance(value, torch.Tensor):
            return value.detach().clone().squeeze() if value.numel() == 1 else None
        if isinstance(value, (int, float)):
            return torch.tensor(value, device=device, dtype=torch.get_default_dtype())
    return None
