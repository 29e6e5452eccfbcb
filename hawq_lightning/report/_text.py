"""Numbers as people read them."""

from __future__ import annotations

import math

from hawq_lightning._shares import binary_size


def size(count: float | None) -> str:
    """Bytes with a binary unit, ``31.2 KiB``; a dash where they are not known."""
    return "–" if count is None else binary_size(count)


def count(number: float | None) -> str:
    """A large count with an SI prefix: ``1.23 G``."""
    if number is None:
        return "–"
    for unit in ("", "k", "M", "G", "T"):
        if abs(number) < 1000 or unit == "T":
            return f"{number:,.0f}" if unit == "" else f"{number:.3g} {unit}"
        number /= 1000
    raise AssertionError


def times(ratio: float | None) -> str:
    """A compression: ``12.0×``."""
    return "–" if ratio is None or not math.isfinite(ratio) else f"{ratio:.1f}×"


def falls(metric: str) -> bool:
    """Whether less of it is better."""
    return any(word in metric.lower() for word in ("loss", "error", "perplexity"))


def score(value: float | None, metric: str = "accuracy") -> str:
    """An accuracy in percent; a mean average precision as it is usual, between 0 and 1."""
    if value is None:
        return "–"
    return f"{100 * value:.2f}%" if metric == "accuracy" and 0 <= value <= 1 else f"{value:.3f}"


def plain(value: object) -> str:
    """Anything, short."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "–"}[value]
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, (list, tuple)):
        return ", ".join(plain(v) for v in value)
    if isinstance(value, dict):
        return ", ".join(f"{k} {plain(v)}" for k, v in value.items())
    return str(value)


def names(listed: list[str], most: int = 6) -> str:
    """The first few of many names."""
    more = len(listed) - most
    return ", ".join(listed[:most]) + (f" and {more} more" if more > 0 else "")
