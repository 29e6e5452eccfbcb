"""What selection minimises, added up over sites: Ω of the paper's eq. 10, or a score of the user's own."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar, Literal, TypeVar

from hawq_lightning._errors import HawqError
from hawq_lightning._plan import Candidate
from hawq_lightning._registry import Registry
from hawq_lightning._site_table import Site

Need = Literal["traces", "quadratic_forms"]


class Score(ABC):
    """A number for every candidate, >= 0; the plan with the least sum is chosen.

    When traces are drawn again (bootstrap, stop by stable plan), Ω of the candidates and the mean traces are those of
    the draw, and the score is computed anew from them: it need not be linear in the trace.

    Attributes:
        symbol: what messages call it.
        needs: ``traces``: sites without a measured trace are refused; ``quadratic_forms``: the callback measures them.
    """

    symbol: ClassVar[str] = "score"
    needs: ClassVar[frozenset[Need]] = frozenset()

    @abstractmethod
    def of(self, site: Site, candidate: Candidate, mean_trace: float) -> float:
        """The score of one candidate of one site; ``inf``: not available.

        Args:
            site: with its number of elements.
            candidate: bits, code, Ω and perturbation.
            mean_trace: of the site, guarded against noise; NaN where the score does not need traces.
        """


SCORES: Registry[Score] = Registry("score")
AnyScore = TypeVar("AnyScore", bound=type[Score])


def register_score(name: str) -> Callable[[AnyScore], AnyScore]:
    """Class decorator: make a :class:`Score` known by name.

    Args:
        name: lower-case letters, digits and underscores; goes into plans.

    Raises:
        HawqError: a malformed name, or another score has it.
    """

    def add(cls: AnyScore) -> AnyScore:
        SCORES.add(name, cls())
        return cls

    return add


DEFAULT_SCORE = "omega"


@register_score(DEFAULT_SCORE)
class Omega(Score):
    """Ω (paper eq. 10): mean trace · perturbation; for activations weighed image by image when it was measured."""

    symbol = "Ω"

    def of(self, site: Site, candidate: Candidate, mean_trace: float) -> float:
        """The Ω that was measured."""
        return candidate.omega


@register_score("rounding")
class Rounding(Score):
    """Q, the quadratic form of the real rounding error: for experiments.

    As a prediction it is nearer to the measured loss than Ω. As the objective it chose worse plans in several settings:
    an optimizer picks what is scored too low by luck, of which Ω, being smooth, has less.
    """

    symbol, needs = "Q", frozenset({"quadratic_forms"})

    def of(self, site: Site, candidate: Candidate, mean_trace: float) -> float:
        """The Q that was measured; that of a concave loss counts 0.

        Raises:
            HawqError: none was.
        """
        if candidate.q is None:
            raise HawqError(
                f"The score Q needs quadratic forms, and {site.name!r} has none at {candidate.bits} bits: measure with "
                "MeasureConfig(quadratic_forms=True), or measure(..., rounding=)."
            )
        return max(0.0, candidate.q)


@register_score("both")
class OmegaAndRounding(Rounding):
    """The geometric mean of Ω and Q: for experiments."""

    symbol = "√(ΩQ)"

    def of(self, site: Site, candidate: Candidate, mean_trace: float) -> float:
        """See :meth:`Rounding.of`."""
        q = super().of(site, candidate, mean_trace)
        return math.sqrt(candidate.omega * q) if math.isfinite(candidate.omega) else candidate.omega
