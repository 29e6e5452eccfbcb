"""BatchNorm with other statistics than those that training averaged: of the batch at hand, or of some batches."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


def norms_of(model: nn.Module) -> dict[str, _BatchNorm]:
    """Every BatchNorm, by name, whether or not it has running statistics."""
    return {n: m for n, m in model.named_modules() if isinstance(m, _BatchNorm)}


def norms_with_statistics(model: nn.Module) -> dict[str, _BatchNorm]:
    """Those that have running statistics, by name."""
    return {n: m for n, m in norms_of(model).items() if m.running_var is not None}


@contextlib.contextmanager
def batch_statistics(model: nn.Module) -> Iterator[None]:
    """Inside, every BatchNorm takes the statistics of its batch, and its running ones stay."""
    with _training(list(norms_of(model).values()), 0.0):
        yield


@contextlib.contextmanager
def new_statistics(model: nn.Module, momentum: float | None = None) -> Iterator[None]:
    """Inside, running statistics become those of the batches that pass, and so they stay.

    Args:
        model: in any mode, which it has again afterwards.
        momentum: of a moving average that begins with the old ones; ``None``: the plain average of the batches.
    """
    norms = list(norms_with_statistics(model).values())
    if momentum is None:
        for m in norms:
            m.reset_running_stats()
    with _training(norms, momentum):
        yield


@contextlib.contextmanager
def _training(norms: list[_BatchNorm], momentum: float | None) -> Iterator[None]:
    before = [(m, m.training, m.momentum) for m in norms]
    try:
        for m in norms:
            m.training, m.momentum = True, momentum
        yield
    finally:
        for m, mode, old in before:
            m.training, m.momentum = mode, old
