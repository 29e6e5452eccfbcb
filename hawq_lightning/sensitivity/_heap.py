"""Memory that passes free: given back when there is too much of it, since glibc keeps it in fragments."""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Callable


def release_memory() -> None:
    """Give freed memory back: glibc's heap otherwise grows by tens of MB a batch, in fragments (measured: 9 GB)."""
    trim = _malloc_trim()
    if trim is not None:
        trim(0)


class Heap:
    """Gives freed memory back once the process has grown since the first batch.

    Not after every batch: all pages would have to be made anew for the next one, a seventh of its time.
    """

    def __init__(self) -> None:
        self._first = 0

    def tidy(self) -> None:
        """After a batch."""
        pages = _resident_pages()
        self._first = self._first or pages
        if pages > 1.05 * self._first + _SLACK:
            release_memory()


_SLACK = 1 << 13  # pages: 32 MiB of 4 KiB


def _resident_pages() -> int:
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1])
    except OSError:  # not Linux
        return 0


@functools.cache
def _malloc_trim() -> Callable[[int], object] | None:
    if not sys.platform.startswith("linux"):
        return None
    return getattr(ctypes.CDLL(None), "malloc_trim", None)  # absent in musl
