"""Whether a file can be written, found out before the work."""

from __future__ import annotations

import tempfile
from pathlib import Path

from hawq_lightning._errors import HawqError


def check_writable(path: Path) -> None:
    """Raise HawqError now rather than after a minute of work."""
    if "\0" in str(path):
        raise HawqError(f"Cannot write {str(path)!r}: the name holds a null byte.")
    try:
        if path.is_dir():
            raise HawqError(f"Cannot write {path}: it is a folder.")
        if path.exists() and not path.is_file():
            raise HawqError(f"Cannot write {path}: it is no ordinary file.")
        path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise HawqError(f"Cannot write {path}: {error.strerror or error}.") from error
