"""The one place that answers when memory runs out: it is recognised here, and fewer samples are tried from here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch

Result = TypeVar("Result")
RAN_OUT = "Memory ran out"  # how every note and error about it begins


@dataclass(frozen=True)
class RanOut:
    """What :func:`attempt` gives in the place of a result.

    Attributes:
        error: the exception without its traceback, whose frames would keep the graph alive.
    """

    error: Exception

    def __str__(self) -> str:
        return str(self.error).strip().split("\n")[0]


def attempt(run: Callable[[], Result]) -> Result | RanOut:
    """The result of ``run``, or :class:`RanOut` where memory was too small for it; other errors pass."""
    try:
        return run()
    except Exception as error:
        if not out_of_memory(error):
            raise
        ran_out = RanOut(error)
    # outside of the handler: only now is the graph, which the traceback held, free for a second try
    ran_out.error.__traceback__ = None
    return ran_out


def with_fewer(run: Callable[[int], Result], samples: int, fewer: Callable[[int, RanOut], int]) -> tuple[Result, int]:
    """``run(samples)``, with fewer of them for as long as memory runs out.

    Args:
        run: gets the number of samples.
        samples: to begin with.
        fewer: the next number, from the one that was too many and what was raised; raises where there is none.

    Returns:
        the result, and for how many samples memory held.
    """
    while isinstance(result := attempt(partial(run, samples)), RanOut):
        samples = fewer(samples, result)
    return result, samples


def half(samples: int, ran_out: RanOut) -> int:
    """Half as many, for :func:`with_fewer`.

    Raises:
        Exception: what was raised, where a single sample is too much.
    """
    if samples < 2:
        raise ran_out.error
    return samples // 2


def out_of_memory(error: Exception) -> bool:
    """Whether an exception says that memory ran out, on whatever device."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    text = str(error)
    # CPU and other backends have no class of their own for it
    return isinstance(error, RuntimeError) and ("out of memory" in text or "can't allocate memory" in text)
