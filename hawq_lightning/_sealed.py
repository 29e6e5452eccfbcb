"""Records with a checksum, read back: damage names the file, and a change since it was written is told."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from hawq_lightning._errors import HawqError
from hawq_lightning._fields import was_changed
from hawq_lightning._io import PLAN_JSON, read_json

Record = TypeVar("Record")


def load_sealed(path: str | Path, what: str, read: Callable[[object], Record]) -> Record:
    """Read a record from JSON, for a caller that the user calls.

    Args:
        path: of the file.
        what: it holds, in words.
        read: makes the record of what the JSON says.

    Raises:
        HawqError: no such file, no JSON, or damaged; the message names file and field.
    """
    data = read_json(path, what, PLAN_JSON)
    try:
        made = read(data)
    except HawqError as error:
        raise HawqError(f"{path}: {error}") from error
    if was_changed(data):
        warnings.warn(f"The {what} at {path} was changed after it was written.", stacklevel=3)
    return made
