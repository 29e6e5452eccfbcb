"""Numbers from outside, checked before anything is made of them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from hawq_lightning._errors import HawqError, nearest
from hawq_lightning._plan import Candidate, check_choice
from hawq_lightning._site_table import Site


def check_sites(sites: Sequence[Site], options: Mapping[str, Sequence[Candidate]]) -> None:
    """Raise HawqError for duplicate, unknown or empty sites, and for weights without options."""
    names = [s.name for s in sites]
    if not names:
        raise HawqError("There are no sites to choose bits for.")
    if twice := sorted({n for n in names if names.count(n) > 1}):
        raise HawqError(f"These sites are given twice: {', '.join(twice)}.")
    for name in options:
        if name not in names:
            raise HawqError(f"Options are given for {name!r}, which is no site.{nearest(name, names)}")
    for site in sites:
        if site.kind == "weight" and not options.get(site.name):
            raise HawqError(f"The weight site {site.name!r} has no options.{nearest(site.name, options)}")
        if site.numel < 1 and site.name in options:
            raise HawqError(f"Site {site.name!r} has no elements, so its bits cost nothing; exclude it.")


def best_by_bits(site: Site, options: Iterable[Candidate]) -> dict[int, tuple[int, float]]:
    """Bits -> (index of the option with the least Ω, that Ω)."""
    best: dict[int, tuple[int, float]] = {}
    for j, option in enumerate(options):
        check_choice(site.name, site.kind, option.bits, option.code)
        if math.isnan(option.omega) or option.omega < 0:
            raise HawqError(
                f"Ω of site {site.name!r} at {option.bits} bits is {option.omega}; it must be a number >= 0 "
                "(a negative trace means that the estimate is noise or the model is no minimum; try estimator='ggn')."
            )
        if option.omega < best.get(option.bits, (0, math.inf))[1]:
            best[option.bits] = (j, option.omega)
    if not best:
        raise HawqError(f"Site {site.name!r} has no available option: every Ω is inf.")
    return best


def extra_cost(name: str, table: Mapping[str, Mapping[int, float]], sites: Sequence[Site]) -> list[Mapping[int, float]]:
    """By site, bits -> cost. A site that is not named costs nothing; bits that a named site lacks are not available."""
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
