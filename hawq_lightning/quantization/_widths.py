"""A check of names out of a list."""

from __future__ import annotations

from typing import Any

from hawq_lightning._errors import HawqError, nearest


def one_of(what: str, value: Any, known: tuple[str, ...]) -> str:
    """Return ``value``, or raise HawqError unless it is one of ``known``."""
    if value not in known:
        raise HawqError(f"{what}={value!r} is unknown; use one of {', '.join(known)}.{nearest(str(value), known)}")
    return str(value)
