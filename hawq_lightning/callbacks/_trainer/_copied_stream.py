"""Streams are read from a copy, since whoever reads from one may move it on."""

from __future__ import annotations

import copy
from typing import TypeVar

from hawq_lightning._errors import HawqError

Stream = TypeVar("Stream")


def copied_stream(stream: Stream, what: str) -> Stream:
    """A deep copy of a stream.

    Args:
        stream: an iterable, such as an ``IterableDataset``.
        what: it is, in a word or two.

    Raises:
        HawqError: it holds something that cannot be copied, such as an open file or a generator.
    """
    try:
        return copy.deepcopy(stream)
    except Exception as error:  # whatever the user's objects raise when they are copied
        raise HawqError(
            f"The {what} {type(stream).__name__!r} cannot be copied ({error}), and reading it to measure would take "
            "samples away from training: let its __iter__ open what it reads from, each time anew, so that it can be "
            "copied and read twice."
        ) from error
