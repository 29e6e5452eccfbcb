"""One line of progress for everything that takes more than some seconds, silent where nobody looks."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol


def seconds_since(start: float) -> float:
    """Seconds since ``time.perf_counter()`` said ``start``; 0 where the clock went back, as on suspended machines."""
    return max(0.0, time.perf_counter() - start)


class Advance(Protocol):
    """Tells how far a computation is."""

    def __call__(self, done: int, what: str | None = None) -> None:
        """Show ``done`` steps, and ``what`` as the text from now on."""


@contextmanager
def progress_bar(what: str, total: int, progress: bool) -> Iterator[Advance]:
    """A bar on the terminal while the block runs.

    Args:
        what: text before the bar.
        total: number of steps.
        progress: ``False``: nothing is shown.

    Yields:
        a function of the number of steps done.
    """
    if not progress:
        yield lambda done, what=None: None
        return
    from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn  # slow to import

    with Progress(*Progress.get_default_columns(), MofNCompleteColumn(), TimeElapsedColumn(), transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield lambda done, what=None: bar.update(task, completed=done, description=what)
