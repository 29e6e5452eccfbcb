"""Checks of what a user asks for: widths, and names out of a list."""

from __future__ import annotations

from numbers import Integral, Real
from typing import Any

from hawq_lightning._errors import HawqError, nearest
from hawq_lightning._plan import ACTIVATION_BITS, WEIGHT_BITS


def one_of(what: str, value: Any, known: tuple[str, ...]) -> str:
    """Return ``value``, or raise HawqError unless it is one of ``known``."""
    if value not in known:
        raise HawqError(f"{what}={value!r} is unknown; use one of {', '.join(known)}.{nearest(str(value), known)}")
    return str(value)


def check_bits(values: Any, kind: str) -> tuple[int, ...]:
    """Widths that a user asked for, as an ascending tuple.

    Args:
        values: an int or several.
        kind: ``weight`` or ``activation``.

    Raises:
        HawqError: not whole numbers, or out of range (1 to 8 for weights, 2 to 8 for activations).
    """
    allowed = WEIGHT_BITS if kind == "weight" else ACTIVATION_BITS
    listed = list(values) if isinstance(values, (list, tuple, range, set)) or hasattr(values, "__iter__") else [values]
    if not listed:
        raise HawqError(f"{kind}_bits is empty; give at least one width from {allowed[0]} to {allowed[-1]}.")
    for value in listed:
        if isinstance(value, bool) or not isinstance(value, Integral) or value not in allowed:
            near = min(allowed, key=lambda b: abs(b - float(value))) if isinstance(value, Real) else allowed[-1]
            raise HawqError(
                f"{kind}_bits has {value!r}; allowed are {allowed[0]} to {allowed[-1]}, the nearest is {near}."
            )
    return tuple(sorted({int(b) for b in listed}))
