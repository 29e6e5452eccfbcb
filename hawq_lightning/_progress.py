"""One progress bar for everything that takes more than some seconds, silent where nobody looks."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.progress import Progress


def seconds_since(start: float) -> float:
    """Seconds since ``time.perf_counter()`` said ``start``; 0 where the clock went back, as on suspended machines."""
    return max(0.0, time.perf_counter() - start)


class Bar:
    """What a long computation calls; this base shows nothing."""

    def begin(self, what: str, total: int) -> Any:
        """A new phase of ``total`` steps; returns its handle."""

    def advance(self, task: Any, done: int) -> None:
        """``done`` steps of it are behind us."""


class RichBar(Bar):
    """One line that is renamed from phase to phase."""

    def __init__(self, shown: Progress) -> None:
        self._shown = shown
        self._task: Any = None

    def begin(self, what: str, total: int) -> Any:
        """See :class:`Bar`."""
        if self._task is None:
            self._task = self._shown.add_task(what, total=total)
        else:
            self._shown.reset(self._task, description=what, total=total)
        return self._task

    def advance(self, task: Any, done: int) -> None:
        """See :class:`Bar`."""
        self._shown.update(task, completed=done)


@contextmanager
def progress_bar(show: bool) -> Iterator[Bar]:
    """A bar on the terminal while the block runs, or a silent one."""
    if not show:
        yield Bar()
        return
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, transient=True) as shown:
        yield RichBar(shown)
