"""Files: one writer that a crash cannot cut short, and one reader of JSON that a stranger's file cannot exhaust."""

from __future__ import annotations

import json
import math
import os
import re
import tempfile
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hawq_lightning._errors import HawqError

_DEEPEST = 100  # JSON objects and lists within each other
_NOT_IN_JSON = {"Infinity": math.inf, "-Infinity": -math.inf, "NaN": math.nan}


@dataclass(frozen=True)
class JsonLimits:
    """How much a JSON file may hold, told before it is parsed: ten bytes of text can be a kilobyte of objects.

    Attributes:
        size: bytes of text.
        containers: objects, lists and fields of objects.
        items: of all of them together.
    """

    size: int = 1 << 29
    containers: int | None = None
    items: int | None = None


ANY_JSON = JsonLimits()
PLAN_JSON = JsonLimits(size=1 << 26, containers=1 << 20, items=1 << 20)  # 13,000 sites of eight candidates
TRACES_JSON = JsonLimits(containers=1 << 20, items=1 << 25)  # traces of 100 sites on 300,000 images
RECORD_JSON = JsonLimits(size=1 << 26, containers=1 << 20, items=1 << 20)


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


def json_text(value: object, indent: int | None = None) -> str:
    """JSON that every reader takes; see :func:`without_infinity`."""
    return json.dumps(without_infinity(value), indent=indent, allow_nan=False)


def without_infinity(value: object) -> Any:
    """Plain values whose numbers JSON has: the others are the texts ``Infinity``, ``-Infinity`` and ``NaN``."""
    if isinstance(value, Mapping):
        return {k: without_infinity(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_infinity(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def with_infinity(value: object, fields: Collection[str] | None = None) -> Any:
    """The reverse; numbers that are there already, as Python's reader makes them of older files, stay.

    Args:
        value: plain values.
        fields: of an object: only these; a name may be ``NaN`` too.
    """
    if isinstance(value, Mapping):
        return {k: with_infinity(v) if fields is None or k in fields else v for k, v in value.items()}
    if isinstance(value, list):
        return [with_infinity(v) for v in value]
    return _NOT_IN_JSON.get(value, value) if isinstance(value, str) else value


def check_folder(folder: str | Path) -> None:
    """Raise HawqError now, rather than after an hour of work, where nothing can be written into a folder."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise HawqError(f"Cannot write into {folder}: {error.strerror or error}.") from error


def read_json(path: str | Path, what: str, limits: JsonLimits = ANY_JSON) -> Any:
    """Read JSON, or say in one sentence why it cannot be.

    Args:
        path: of the file.
        what: it is, for the message.
        limits: on what it may hold.

    Raises:
        HawqError: no such file, not readable, more than it may hold, or no JSON.
    """
    path = Path(path)
    if not path.is_file():
        raise HawqError(f"No {what} at {path}.")
    try:
        size = path.stat().st_size
        if size > limits.size:
            raise HawqError(f"The {what} at {path} has {size} bytes; {limits.size} is the most.")
        raw = path.read_bytes()
    except OSError as error:
        raise HawqError(f"The {what} at {path} cannot be read: {error.strerror or error}.") from error
    if limits is not ANY_JSON:
        _check_limits(raw, f"The {what} at {path}", limits)
    try:
        return json.loads(raw.decode("utf-8"))
    except (ValueError, RecursionError) as error:  # no UTF-8, no JSON, a number of thousands of digits
        raise HawqError(f"The {what} at {path} is corrupt or cut short: {error}.") from error


def _check_limits(raw: bytes, what: str, limits: JsonLimits) -> None:
    # without the strings every bracket, colon and comma that is left counts something
    if b"\\" in raw:
        raw = re.sub(rb"\\.", b"", raw, flags=re.DOTALL)
    raw = re.sub(rb'"[^"]*"', b"", raw)
    counts = ((limits.containers, b"[{:", "objects, lists and fields"), (limits.items, b",", "items"))
    for most, signs, name in counts:
        count = sum(raw.count(signs[i : i + 1]) for i in range(len(signs)))
        if most is not None and count > most:
            raise HawqError(f"{what} holds {count} {name}; {most} is the most.")
    depth = 0
    for run in re.finditer(rb"[\[{]+|[\]}]+", raw):
        length = run.end() - run.start()
        depth += length if run[0][0] in b"[{" else -length
        if depth > _DEEPEST:
            raise HawqError(f"{what} has more than {_DEEPEST} objects and lists within each other.")
