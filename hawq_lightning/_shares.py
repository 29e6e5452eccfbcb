"""How sizes, compressions and shares are said: always of what."""

from __future__ import annotations

import math
from collections.abc import Mapping


def percent(share: float) -> str:
    """A share that is never rounded to nothing or to all: ``92%``, ``99.97%``, ``0.3%``."""
    rounded = (f"{share:.{digits}%}" for digits in range(4))
    whole = share in (0.0, 1.0)
    return next((t for t in rounded if whole or float(t[:-1]) not in (0.0, 100.0)), f"{share:.1g}")


def binary_size(count: float) -> str:
    """Bytes with a binary unit: ``31.2 KiB``."""
    for unit in ("B", "KiB", "MiB"):
        if abs(count) < 1024:
            return f"{count:,.0f} {unit}" if unit == "B" else f"{count:,.1f} {unit}"
        count /= 1024
    return f"{count:,.1f} GiB"


def compressions(costs: Mapping[str, float]) -> tuple[tuple[float, str], ...]:
    """Compressions of a plan and what they are of: the quantized sites' weights, and the whole model.

    Args:
        costs: of the plan; without those of the whole model (plans of arrays, and of earlier releases) there is none.
    """
    quantized = times(costs.get("float_weight_bytes"), costs.get("weight_bytes"))
    whole = times(costs.get("float_model_bytes"), costs.get("model_bytes"))
    if quantized is None:
        return ()
    if whole is None:
        return ((quantized, "of the quantized weights"),)
    share = costs["float_weight_bytes"] / costs["float_model_bytes"]
    return (quantized, f"of the quantized {percent(share)}"), (whole, "of all")


def compression_text(costs: Mapping[str, float], sign: str = "x") -> str:
    """``8.0x of the quantized 92%, 5.1x of all``; empty where nothing is known."""
    return ", ".join(f"{ratio:.1f}{sign} {what}" for ratio, what in compressions(costs))


def times(full: float | None, packed: float | None) -> float | None:
    """How many times smaller, ``None`` where one of the two is not known."""
    return full / packed if full and packed and math.isfinite(full / packed) else None
