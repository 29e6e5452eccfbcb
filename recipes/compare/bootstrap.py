"""Bootstrap intervals of scores and of differences between two methods, over validation images and over seeds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hawq_lightning import HawqError

Floats = NDArray[np.float64]
DRAWS = 2000


@dataclass(frozen=True)
class Interval:
    """A value with the ends of its bootstrap interval (95% unless asked otherwise)."""

    value: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        """Whether zero lies outside."""
        return self.low > 0 or self.high < 0


def weights_of_draws(count: int, draws: int, rng: np.random.Generator) -> Floats:
    """How often each of ``count`` things is drawn, ``[draws, count]``; each row sums to ``count``."""
    return rng.multinomial(count, np.full(count, 1 / count), size=draws).astype(np.float64)


def bootstrap_mean(values: Floats, draws: int = DRAWS, seed: int = 0, level: float = 0.95) -> Interval:
    """The mean of a table over seeds and images, with its percentile interval.

    Seeds and images are drawn with replacement, independently of each other; the images of a draw are the same for
    all of its seeds, as in the experiment. With one seed only the images are drawn, and the interval says nothing
    about the seed.

    Args:
        values: ``[seeds, images]``; for a paired comparison the difference of two methods at the same seed and image.
        draws: bootstrap samples.
        seed: of the draws.
        level: coverage.

    Raises:
        HawqError: an empty table.
    """
    if values.ndim != 2 or not values.size:
        raise HawqError(f"A bootstrap needs a table of seeds and images; this one has shape {values.shape}.")
    rng = np.random.default_rng(seed)
    seeds, images = values.shape
    drawn = np.empty(draws)
    pick = weights_of_draws(seeds, draws, rng) / seeds
    for start in range(0, draws, 200):  # a few megabytes at a time
        part = pick[start : start + 200]
        rows = weights_of_draws(images, len(part), rng) / images
        drawn[start : start + len(part)] = np.einsum("ds,sd->d", part, values @ rows.T)
    return _interval(float(values.mean()), drawn, level)


def bootstrap_score(
    score: Callable[[Floats], float], images: int, draws: int = DRAWS, seed: int = 0, level: float = 0.95
) -> Interval:
    """Any score of weighted images, such as mean average precision, with its percentile interval over images.

    Args:
        score: of the weights ``[images]`` (ones: the score itself); for a difference, that of two methods.
        images: their number.
        draws: bootstrap samples.
        seed: of the draws.
        level: coverage.
    """
    rng = np.random.default_rng(seed)
    drawn = np.asarray([score(w) for w in weights_of_draws(images, draws, rng)])
    return _interval(score(np.ones(images)), drawn, level)


def _interval(value: float, drawn: Floats, level: float) -> Interval:
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return Interval(value, float(low), float(high))
