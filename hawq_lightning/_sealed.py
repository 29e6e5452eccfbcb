"""Records with a checksum, read back: damage names the file, and a change since it was written is told."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from hawq_lightning._errors import HawqError
from hawq_lightning._fields import was_changed
from hawq_lightning._io import PLAN_JSON, JsonLimits, read_json

Record = TypeVar("Record")


def load_sealed(
    path: str | Path, what: str, read: Callable[[object], Record], limits: JsonLimits = PLAN_JSON
) -> Record:
    """Read a record from JSON, for a caller that the user calls; one that was changed is taken as it now stands.

    Args:
        path: of the file.
        what: it holds, in words.
        read: makes the record of what the JSON says.
        limits: of such a file.

    Raises:
        HawqError: no such file, no JSON, or damaged; the message names file and field.
    """
    made, changed = read_sealed(path, what, read, limits)
    if changed:
        warnings.warn(
            f"The {what} at {path} was changed after it was written; it is taken as it now stands (delete its line "
            "'sha256' to say that this is meant).",
            stacklevel=3,
        )
    return made


def read_sealed(
    path: str | Path, what: str, read: Callable[[object], Record], limits: JsonLimits = PLAN_JSON
) -> tuple[Record, bool]:
    """What :func:`load_sealed` gives, and whether the file was changed since it was written."""
    data = read_json(path, what, limits)
    try:
        return read(data), was_changed(data)
    except HawqError as error:
        raise HawqError(f"{path}: {error}") from error
