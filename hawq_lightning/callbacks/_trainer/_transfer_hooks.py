"""A user's transfer hooks run without leaving a trace: they may augment, draw random numbers and move statistics."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from hawq_lightning.sensitivity import HeldNames, HeldState, random_states_kept


@contextmanager
def hooks_leave_no_trace(module: nn.Module, seed: int) -> Iterator[None]:
    """Put back buffers and random states after a hook; its attributes are put back with those of the step.

    Args:
        module: whose buffers a hook may move, such as the statistics of a BatchNorm that it calls.
        seed: of what the hook draws: a batch that is moved again is the same again.
    """
    names, buffers = HeldNames(module.modules()), HeldState(module.buffers())
    try:
        with random_states_kept(seed):
            yield
    finally:
        names.put_back()
        buffers.put_back()
