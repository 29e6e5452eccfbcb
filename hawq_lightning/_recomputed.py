"""Functions that are run again in the backward pass: ``torch.utils.checkpoint``, in the form that keeps gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch.utils.checkpoint import CheckpointFunction, checkpoint


@contextmanager
def reentrant_checkpoints_replaced() -> Iterator[None]:
    """Inside, reentrant checkpoints (``checkpoint(f, x)``, ``checkpoint_sequential``) are of the other kind.

    The reentrant form first runs a function under ``no_grad``, so that its layers look as a teacher's do, and it cannot
    be differentiated twice. Values and gradients of the two forms are the same.
    """

    def apply(function: Callable[..., object], preserve_rng_state: bool, *args: object) -> object:
        if not torch.is_grad_enabled():
            return function(*args)
        return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=preserve_rng_state)

    before = CheckpointFunction.__dict__.get("apply")
    CheckpointFunction.apply = staticmethod(apply)
    try:
        yield
    finally:
        if before is None:
            del CheckpointFunction.apply
        else:
            CheckpointFunction.apply = before
