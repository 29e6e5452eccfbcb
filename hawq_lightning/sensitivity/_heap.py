"""Memory that passes free: kept for the next pass, and given back when there is too much of it or they are done.

glibc returns the top of its heap to the system whenever enough of it is free, so that every pass makes its pages anew:
a seventh of its time. Inside, it keeps fragments, which grow by tens of MB a batch.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # parameters of mallopt (malloc.h)
_NEVER = -1
# what glibc itself raises both to, once blocks so large have been freed; who sets one of them has to set the other
_TRIM, _MMAP = 64 << 20, 32 << 20
_INSIDE: list[bool] = []


@contextmanager
def pages_kept() -> Iterator[None]:
    """Inside, freed memory stays with the process, for passes that repeat; at the end it is given back.

    On Linux with glibc, unless the user has set its thresholds in the environment; elsewhere nothing happens.
    """
    set_option = _mallopt()
    if set_option is None or _INSIDE:
        yield
        return
    set_option(_MMAP_THRESHOLD, _MMAP)
    set_option(_TRIM_THRESHOLD, _NEVER)
    _INSIDE.append(True)
    try:
        yield
    finally:
        _INSIDE.clear()
        set_option(_TRIM_THRESHOLD, _TRIM)
        release_memory()


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
    return _of_glibc("malloc_trim")


@functools.cache
def _mallopt() -> Callable[[int, int], object] | None:
    theirs = any(n.startswith(("MALLOC_TRIM_", "MALLOC_MMAP_")) for n in os.environ)
    if theirs or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return None
    return _of_glibc("mallopt")


def _of_glibc(name: str) -> Callable[..., object] | None:
    if not sys.platform.startswith("linux"):
        return None
    libc = ctypes.CDLL(None)
    return getattr(libc, name, None) if hasattr(libc, "gnu_get_libc_version") else None  # absent in musl
