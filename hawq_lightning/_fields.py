"""Fields of JSON files, each checked: what a file says is somebody else's word, damaged or not."""

from __future__ import annotations

import hashlib
import json
import math
import reprlib
from collections.abc import Iterable, Mapping

from hawq_lightning._errors import HawqError, nearest
from hawq_lightning._types import JsonObject

CHECKSUM = "sha256"


def checksum(body: JsonObject) -> str:
    """SHA-256 of what a JSON file says beside its line ``sha256``; layout and order of the keys do not matter."""
    relevant = {k: v for k, v in body.items() if k != CHECKSUM}
    text = json.dumps(relevant, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def sealed(body: JsonObject) -> JsonObject:
    """A JSON object with a checksum of what it says, the keys ``format`` and ``version`` first."""
    plain: JsonObject = json.loads(json.dumps(body))  # as it will be read: tuples are lists, keys are strings
    head = {k: plain[k] for k in ("format", "version") if k in plain}
    return head | {CHECKSUM: checksum(plain)} | plain


def was_changed(data: JsonObject) -> bool:
    """Whether a file carries a checksum that is not its own."""
    return CHECKSUM in data and data[CHECKSUM] != checksum(data)


def shown(value: object) -> str:
    """A value for a message, cut short."""
    return reprlib.repr(value)


def number(value: object, what: str, low: float = -math.inf, high: float = math.inf) -> float:
    """A finite number.

    Args:
        value: from JSON.
        what: the field, for the message.
        low: the least that it may be.
        high: the most that it may be.

    Raises:
        HawqError: it is none, or out of range.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise HawqError(f"{what} is {shown(value)}, not a number")
    try:
        real = float(value)
    except OverflowError:  # a whole number of hundreds of digits
        real = math.inf
    if not math.isfinite(real):
        raise HawqError(f"{what} is {shown(value)}, not a finite number")
    if not low <= real <= high:
        raise HawqError(f"{what} is {shown(value)}; {_range(low, high)}")
    return real


def whole(value: object, what: str, low: int = 0, high: int = 1 << 53) -> int:
    """A whole number.

    Args:
        value: from JSON.
        what: the field, for the message.
        low: the least that it may be.
        high: the most that it may be.

    Raises:
        HawqError: it is none, or out of range.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise HawqError(f"{what} is {shown(value)}, not a whole number")
    if not low <= value <= high:
        raise HawqError(f"{what} is {shown(value)}; {_range(low, high)}")
    return value


def text(value: object, what: str) -> str:
    """A string.

    Raises:
        HawqError: it is none.
    """
    if not isinstance(value, str):
        raise HawqError(f"{what} is {shown(value)}, not text")
    return value


def table(value: object, what: str) -> JsonObject:
    """A JSON object.

    Raises:
        HawqError: it is none.
    """
    if not isinstance(value, dict):
        raise HawqError(f"{what} is {shown(value)}, not a JSON object")
    return value


def sequence(value: object, what: str) -> list[object]:
    """A JSON array.

    Raises:
        HawqError: it is none.
    """
    if not isinstance(value, list):
        raise HawqError(f"{what} is {shown(value)}, not a list")
    return value


def check_names(data: Mapping[str, object], what: str, required: Iterable[str], optional: Iterable[str] = ()) -> None:
    """Raise HawqError unless an object has the fields that it must have, and no other than it may have.

    Args:
        data: the object.
        what: it is, for the message.
        required: names of fields.
        optional: names of further fields.
    """
    required = list(required)
    allowed = [*required, *optional]
    for name in data:
        if name not in allowed:
            raise HawqError(f"{what} has an unknown field {shown(name)}.{nearest(str(name), allowed)}".rstrip("."))
    for name in required:
        if name not in data:
            raise HawqError(f"{what} has no field {name!r}")


def _range(low: float, high: float) -> str:
    if math.isinf(high):
        return f"it must be at least {low:g}"
    return f"it must be from {low:g} to {high:g}"
