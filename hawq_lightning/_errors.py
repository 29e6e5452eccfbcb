"""The one error users see for bad input, and the "did you mean" that goes with it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class HawqError(ValueError):
    """Bad input. The message names the offending thing and the nearest valid choice."""


def nearest(name: str, choices: Iterable[str], n: int = 3) -> str:
    """Return ``" Did you mean 'a', 'b'?"`` for the closest choices, or an empty string."""
    close = difflib.get_close_matches(name, list(choices), n=n, cutoff=0.4)
    return f" Did you mean {', '.join(repr(c) for c in close)}?" if close else ""
