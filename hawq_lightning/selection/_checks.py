"""Numbers from outside, checked before anything is made of them."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import SupportsIndex

import numpy as np

from hawq_lightning._errors import HawqError, nearest
from hawq_lightning._plan import Candidate, check_choice
from hawq_lightning._site_table import Site

MOST_OMEGA = 1e290  # sums over millions of sites stay below the largest double, 1.8e308


def whole_number(value: object, what: str) -> int:
    """A whole number of whatever type; 2.0 is one, and 2.7 is not taken for 2.

    Args:
        value: from the user.
        what: it is, for the message.

    Raises:
        HawqError: it is none.
    """
    if not isinstance(value, (bool, np.bool_)):
        if isinstance(value, SupportsIndex):
            try:
                return operator.index(value)
            except (TypeError, RuntimeError, ValueError):  # a tensor or array of another kind
                pass
        if isinstance(value, (float, np.floating)) and math.isfinite(value):
            if value == int(value):
                return int(value)
            raise HawqError(f"{what} is {value!r}, not a whole number; the nearest is {round(float(value))}.")
    raise HawqError(f"{what} is {value!r}, not a whole number.")


def check_sites(sites: Sequence[Site], candidates: Mapping[str, Sequence[Candidate]]) -> None:
    """Raise HawqError for duplicate, unknown or empty sites, and for weights without candidates."""
    names = [s.name for s in sites]
    if not names:
        raise HawqError("There are no sites to choose bits for.")
    if twice := sorted({n for n in names if names.count(n) > 1}):
        raise HawqError(f"These sites are given twice: {', '.join(twice)}.")
    for name in candidates:
        if name not in names:
            raise HawqError(f"Candidates are given for {name!r}, which is no site.{nearest(name, names)}")
    for site in sites:
        if site.kind == "weight" and not candidates.get(site.name):
            raise HawqError(f"The weight site {site.name!r} has no candidates.{nearest(site.name, candidates)}")
        if site.numel < 1 and site.name in candidates:
            raise HawqError(f"Site {site.name!r} has no elements, so its bits cost nothing; exclude it.")


def best_by_bits(
    site: Site, candidates: Sequence[Candidate], score_of: Callable[[Candidate], float], symbol: str
) -> dict[int, tuple[int, float]]:
    """Bits -> (index of the candidate with the least score, that score).

    Args:
        site: for messages.
        candidates: of the site.
        score_of: the score of one; ``inf``: not available.
        symbol: what messages call the score.

    Raises:
        HawqError: bits or codes that do not exist, a score that is NaN, negative or too large, nothing available.
    """
    best: dict[int, tuple[int, float]] = {}
    for j, candidate in enumerate(candidates):
        check_choice(site.name, site.kind, candidate.bits, candidate.code)
        score = score_of(candidate)
        if math.isnan(score) or score < 0:
            raise HawqError(
                f"{symbol} of site {site.name!r} at {candidate.bits} bits is {score}; it must be a number >= 0 "
                "(a negative trace means that the estimate is noise or the model is no minimum; try estimator='ggn')."
            )
        if MOST_OMEGA < score < math.inf:
            raise HawqError(
                f"{symbol} of site {site.name!r} at {candidate.bits} bits is {score:.3g}; more than {MOST_OMEGA:g} "
                "cannot be added up: give it in a larger unit."
            )
        if score < best.get(candidate.bits, (0, math.inf))[1]:
            best[candidate.bits] = (j, score)
    if not best:
        raise HawqError(f"Site {site.name!r} has no available option: every {symbol} is inf.")
    return best


def cost_table(name: str, table: Mapping[str, Mapping[int, float]], sites: Sequence[Site]) -> list[Mapping[int, float]]:
    """By site, bits -> cost. A site that is not named costs nothing; bits that a named site lacks are not available.

    Args:
        name: of the cost.
        table: site name -> bits -> cost.
        sites: of the problem.

    Raises:
        HawqError: a name that is no site, or a cost that is NaN or negative.
    """
    for key, row in table.items():
        if key not in {s.name for s in sites}:
            raise HawqError(
                f"The cost {name!r} is given for {key!r}, which is no site.{nearest(key, [s.name for s in sites])}"
            )
        for bits, cost in row.items():
            if math.isnan(cost) or cost < 0:
                raise HawqError(
                    f"The cost {name!r} of site {key!r} at {bits} bits is {cost}; it must be a number >= 0."
                )
    return [_Missing(table.get(s.name, {})) if s.name in table else _Zero() for s in sites]


class _Missing(dict[int, float]):
    """Bits that the table lacks are not available."""

    def __missing__(self, bits: int) -> float:
        return math.inf


class _Zero(dict[int, float]):
    """A site that the table does not name costs nothing."""

    def __missing__(self, bits: int) -> float:
        return 0.0
