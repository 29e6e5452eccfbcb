"""The one error users see for bad input, the "did you mean" that goes with it, and how many names are listed."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from typing import TypeVar


class HawqError(ValueError):
    """Bad input. The message names the offending thing and the nearest valid choice."""


def nearest(name: str, choices: Iterable[str], n: int = 3) -> str:
    """Return ``" Did you mean 'a', 'b'?"`` for the closest choices, or an empty string.

    Args:
        name: what the user wrote.
        choices: what there is.
        n: of the choices are named at the most.
    """
    close = difflib.get_close_matches(name, list(choices), n=n, cutoff=0.4)
    return f" Did you mean {', '.join(repr(c) for c in close)}?" if close else ""


def some(names: Sequence[str], most: int = 3, what: str = "") -> str:
    """The first names and how many more there are: ``a, b, c and 2 more sites``.

    Args:
        names: all of them.
        most: that are named.
        what: they are, for those that are not named.
    """
    more = f" and {len(names) - most} more {what}".rstrip() if len(names) > most else ""
    return ", ".join(names[:most]) + more


Name = TypeVar("Name", bound=str)


def choice(what: str, value: object, choices: Sequence[Name]) -> Name:
    """Return ``value`` if it is one of ``choices``.

    Args:
        what: the argument's name, for the message.
        value: what the user gave.
        choices: what there is.

    Raises:
        HawqError: it is none of them; the message lists them and suggests the nearest.
    """
    for name in choices:
        if name == value:
            return name
    raise HawqError(f"Unknown {what} {value!r}; use one of {', '.join(choices)}.{nearest(str(value), choices)}")
