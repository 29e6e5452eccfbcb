"""Signals that come while the module is lent out: their handlers save checkpoints, so the module is put back first."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

from lightning.pytorch import Trainer

from hawq_lightning.callbacks._trainer import kind_beside, restore_progress, signal_handlers

Result = TypeVar("Result")
_SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)  # SIGUSR1: SLURM's notice, by default


class _Interrupted(BaseException):
    """Unwinds everything that was changed for a measurement."""


def interruptible(trainer: Trainer, work: Callable[[Callable[[], None]], Result]) -> Result:
    """Run ``work(check)`` so that a signal's handler never sees the module in the state that the work puts it in.

    A signal that somebody has a Python handler for (Lightning: SLURM's requeue) waits until ``work`` calls ``check``,
    which then raises; once all has been put back the handler runs, and the work begins again, from the files that it
    left. With several processes, which would part ways, handlers wait for the end of the work.

    Raises:
        SIGTERMException: a SIGTERM came, as in Lightning's own loops.
    """
    with signal_handlers(trainer):
        while True:
            waiting: list[tuple[Callable[..., Any], int]] = []

            def check(waiting: list[Any] = waiting) -> None:
                if waiting and trainer.world_size == 1:
                    raise _Interrupted

            done = False
            with _held(waiting), suppress(_Interrupted):
                result, done = work(check), True
            if waiting:
                restore_progress(trainer)
            for handler, number in waiting:
                handler(number, None)
            if trainer.received_sigterm:
                raise kind_beside(trainer, "utilities.exceptions.SIGTERMException")
            if done:
                return result


@contextmanager
def _held(waiting: list[tuple[Callable[..., Any], int]]) -> Iterator[None]:
    """Python handlers of signals are noted in ``waiting`` instead of run."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread runs handlers
        return
    handlers = {number: signal.getsignal(number) for number in _SIGNALS}
    held = {number: handler for number, handler in handlers.items() if callable(handler)}
    try:
        for number, handler in held.items():
            signal.signal(number, lambda n, frame, handler=handler: waiting.append((handler, n)))  # type: ignore[misc]
        yield
    finally:
        for number, handler in held.items():
            signal.signal(number, handler)
