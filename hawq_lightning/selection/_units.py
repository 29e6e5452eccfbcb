"""Units that budgets are written in: suffixes, what they stand for, and how a cost is shown."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Unit:
    """The unit of a cost.

    Attributes:
        suffixes: what a budget may end with -> how much it is in the cost's own unit, such as ``{"mJ": 1.0}``.
        display: suffixes to show figures in, the largest first; none: bare numbers.
        text: how number and suffix are put together.
        whole: the last of ``display`` takes whole numbers only.
    """

    suffixes: Mapping[str, float] = field(default_factory=dict)
    display: tuple[str, ...] = ()
    text: str = "{} {}"
    whole: bool = False

    def format(self, value: float, display: Sequence[str] = ()) -> str:
        """Four digits, rounded up, so that the figure can be given back as a budget.

        Args:
            value: in the cost's own unit.
            display: suffixes to show it in, the largest first; default: those of the unit.
        """
        display = display or self.display
        if not display:
            return round_up(value)
        suffix = next((s for s in display if value >= self.suffixes[s]), display[-1])
        if self.whole and suffix == self.display[-1]:
            return self.text.format(math.ceil(value), suffix)
        return self.text.format(round_up(value / self.suffixes[suffix]), suffix)


BYTES = Unit(
    {"B": 1, "kB": 10**3, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30},
    ("MiB", "KiB", "B"), whole=True,
)  # fmt: skip
BIT_OPERATIONS = Unit({"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}, ("M",), "{}{} BOPs")
MILLISECONDS = Unit({"us": 1e-3, "ms": 1.0, "s": 1e3}, ("ms",))


def round_up(value: float) -> str:
    """Four digits, rounded up."""
    digits = max(0, 3 - math.floor(math.log10(value))) if value > 0 else 0
    return f"{math.ceil(value * 10**digits * (1 - 1e-12)) / 10**digits:.{digits}f}"
