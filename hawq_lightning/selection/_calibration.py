"""Straight lines in logarithms, fitted to a few measurements that have a prior idea of their slope."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hawq_lightning.selection._pareto import Floats


@dataclass(frozen=True)
class Line:
    """``log (y - least) = offset + slope log x``.

    Attributes:
        offset: of it.
        slope: of it.
        least: what is left of y where x is nothing.
        left_out: what lines without one of the points each say of that point.
        factor: by which half of those are off at the most; NaN: too few points to tell.
    """

    offset: float
    slope: float
    least: float = 0.0
    left_out: tuple[float, ...] = ()
    factor: float = math.nan

    def __call__(self, x: Floats) -> Floats:
        """y; the least at 0."""
        with np.errstate(divide="ignore"):
            return self.least + np.exp(self.offset + self.slope * np.log(np.asarray(x, dtype=np.float64)))


def fit_line(
    x: Sequence[float],
    y: Sequence[float],
    variances: Sequence[float],
    slope: tuple[float, float],
    through: tuple[float, float],
    least: float = 0.0,
) -> Line:
    """The line through points, weighed by their variances, whose slope is pulled to what it is expected to be.

    Args:
        x: above 0.
        y: above 0.
        variances: of the logarithms of y.
        slope: as expected, and the standard deviation of that.
        through: a point that it goes through where there are none.
        least: below every y.
    """
    whole, y = y, [v - least for v in y]
    offset, slope_ = _fit(x, y, variances, slope, through)
    if len(x) < 3:
        return Line(offset, slope_, least)
    left_out = []
    for k in range(len(x)):
        rest = [[*v[:k], *v[k + 1 :]] for v in (x, y, variances)]
        a, b = _fit(rest[0], rest[1], rest[2], slope, through)
        left_out.append(least + math.exp(a + b * math.log(x[k])))
    off = statistics.median(abs(math.log(p / q)) for p, q in zip(left_out, whole))
    return Line(offset, slope_, least, tuple(left_out), math.exp(off))


def _fit(
    x: Sequence[float],
    y: Sequence[float],
    variances: Sequence[float],
    slope: tuple[float, float],
    through: tuple[float, float],
) -> tuple[float, float]:
    expected, doubt = slope
    if not len(x):
        return math.log(through[1]) - expected * math.log(through[0]), expected
    u, v, w = np.log(x), np.log(y), 1 / np.asarray(variances, dtype=np.float64)
    mean_u, mean_v = float((w * u).sum() / w.sum()), float((w * v).sum() / w.sum())
    pull = 1 / doubt**2
    value = float(((w * (u - mean_u) * (v - mean_v)).sum() + pull * expected) / ((w * (u - mean_u) ** 2).sum() + pull))
    return mean_v - value * mean_u, value
