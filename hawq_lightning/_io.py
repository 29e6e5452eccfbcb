"""Files: one writer that a crash cannot cut short, and one reader of JSON."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

from hawq_lightning._errors import HawqError

_MOST_TEXT = 1 << 29  # bytes of a JSON file


def write_text(path: str | Path, text: str) -> None:
    """Write a text file so that a crash leaves the old one or the new one.

    Raises:
        HawqError: it cannot be written there.
    """
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: str | Path, data: bytes | bytearray) -> None:
    """Write a file so that a crash leaves the old one or the new one.

    Raises:
        HawqError: it cannot be written there.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    except OSError as error:
        raise HawqError(f"Cannot write {path}: {error.strerror or error}.") from error
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException as error:
        Path(temporary).unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise HawqError(f"Cannot write {path}: {error.strerror or error}.") from error
        raise


def check_folder(folder: str | Path) -> None:
    """Raise HawqError now, rather than after an hour of work, where nothing can be written into a folder."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise HawqError(f"Cannot write into {folder}: {error.strerror or error}.") from error


def read_json(path: str | Path, what: str) -> Any:
    """Read JSON, or say in one sentence why it cannot be."""
    path = Path(path)
    if not path.is_file():
        raise HawqError(f"No {what} at {path}.")
    if path.stat().st_size > _MOST_TEXT:
        raise HawqError(f"The {what} at {path} has {path.stat().st_size} bytes; {_MOST_TEXT} is the most.")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # no UTF-8, no JSON, a number of thousands of digits
        raise HawqError(f"The {what} at {path} is corrupt or cut short: {error}.") from error
