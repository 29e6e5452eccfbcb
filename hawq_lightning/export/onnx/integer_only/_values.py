"""What a float tensor of an integer file stands for: integers times scales, until a grid takes them in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

CODES = 256  # of a byte


@dataclass(frozen=True)
class Integers:
    """What a tensor of the program can hold.

    Attributes:
        low: the least number.
        high: the greatest.
        byte: whether it is UINT8.
    """

    low: int
    high: int
    byte: bool = False

    @property
    def reach(self) -> int:
        """The largest magnitude."""
        return max(abs(self.low), abs(self.high))


@dataclass(frozen=True)
class Term:
    """``(integer - zero) * scale``.

    Attributes:
        tensor: of the program.
        zero: code of 0.
        scale: float64, of a shape that broadcasts to the tensor; it may be negative.
    """

    tensor: str
    zero: int
    scale: np.ndarray


@dataclass(frozen=True)
class Real:
    """``clip(sum of terms + constant, low, high)``.

    Attributes:
        terms: of integer tensors.
        constant: float64, broadcasts to the terms.
        low: what a ReLU or another clamp behind the sum leaves.
        high: see ``low``.
    """

    terms: tuple[Term, ...]
    constant: np.ndarray
    low: float = -np.inf
    high: float = np.inf

    @property
    def clamped(self) -> bool:
        """Whether a clamp stands behind the sum."""
        return self.low > -np.inf or self.high < np.inf

    @property
    def single(self) -> Term | None:
        """The only term, of one scale, nothing added or clamped."""
        one = len(self.terms) == 1 and self.terms[0].scale.size == 1
        return self.terms[0] if one and not self.clamped and not self.constant.any() else None

    def clamp(self, low: float, high: float) -> Real:
        """With another clamp behind."""
        return replace(self, low=min(max(self.low, low), high), high=min(max(self.high, low), high))

    def plus(self, other: Real, sign: int = 1) -> Real:
        """The sum of two without clamps."""
        terms = tuple(replace(t, scale=sign * t.scale) for t in other.terms)
        return Real((*self.terms, *terms), self.constant + sign * other.constant)

    def times(self, factor: np.ndarray) -> Real:
        """Each scale times a number; without a clamp, or with one positive factor."""
        scaled = tuple(replace(t, scale=t.scale * factor) for t in self.terms)
        one = factor.item() if self.clamped else 1.0
        return Real(scaled, self.constant * factor, self.low * one, self.high * one)

    def bounds(self, held: Mapping[str, Integers]) -> tuple[float, float]:
        """The least and the greatest value that it can have."""
        low, high = self.constant.astype(np.float64), self.constant.astype(np.float64)
        for term in self.terms:
            ends = [term.scale * (end - term.zero) for end in (held[term.tensor].low, held[term.tensor].high)]
            low, high = low + np.minimum(*ends), high + np.maximum(*ends)
        return max(float(low.min()), self.low), min(float(high.max()), self.high)

    def at_codes(self) -> np.ndarray | None:
        """Float32 values at the 256 codes of its only tensor; ``None`` where scales or constants are several."""
        if len(self.terms) != 1 or self.terms[0].scale.size != 1 or self.constant.size != 1:
            return None
        term = self.terms[0]
        values = (np.arange(CODES) - term.zero) * term.scale.item() + self.constant.item()
        return np.asarray(np.clip(values, self.low, self.high), np.float32)


@dataclass(frozen=True)
class Function:
    """Any function of a tensor of codes.

    Attributes:
        tensor: of the program, UINT8.
        values: float32, at each of the 256 codes.
    """

    tensor: str
    values: np.ndarray


@dataclass(frozen=True)
class Parts:
    """A concatenation, whose parts have scales of their own.

    Attributes:
        parts: in order.
        axis: along which.
    """

    parts: tuple[Real | Function, ...]
    axis: int


@dataclass(frozen=True)
class Stored:
    """A stored weight or bias.

    Attributes:
        codes: integers.
        scale: float64, one or one a channel.
        axis: of the channels.
    """

    codes: np.ndarray
    scale: np.ndarray
    axis: int

    @property
    def values(self) -> np.ndarray:
        """Real numbers, the codes' shape."""
        shape = [-1 if i == self.axis else 1 for i in range(self.codes.ndim)]
        scale = self.scale if self.scale.size == 1 else self.scale.reshape(shape)
        return np.asarray(self.codes * scale, np.float64)


@dataclass(frozen=True)
class Outside:
    """An input of the network, before its grid.

    Attributes:
        name: of it.
    """

    name: str


Value = Real | Function | Parts | Stored | Outside
