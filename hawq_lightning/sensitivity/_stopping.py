"""When a measurement may stop: rules that look at the traces measured so far, and know nothing of how they came about.

Rules compose: ``AnyOf(RelativeError(0.05), MaxProbes(64, 0.05))`` stops as soon as one of the two says so.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from hawq_lightning._config import MeasureConfig
from hawq_lightning.sensitivity._significance import SIGNIFICANT
from hawq_lightning.sensitivity._statistics import TraceStatistics

_MIN_DEGREES_OF_FREEDOM = 20  # below it a standard error is itself a guess
_SAFETY = 1.15  # stopping at the first small error picks lucky ones: tests hold their 95% intervals to 92% to 98%
_FIRST_LOOK, _LOOK_EVERY = 4, 8  # steps; a rule that selects a plan costs as much as some probes


@dataclass(frozen=True)
class Progress:
    """What a rule sees at the end of a step.

    Attributes:
        statistics: of all processes; an estimate is unbiased at the moments at which rules are asked.
        steps: that are behind.
        probes: random vectors a sample that they took, on average.
        next_probes: how many it will be when rules are asked again.
    """

    statistics: TraceStatistics
    steps: int
    probes: float
    next_probes: float


@dataclass(frozen=True)
class Stop:
    """Why a measurement stops.

    Attributes:
        reason: a word for the result's settings.
        note: a sentence for the user, where there is something to say.
    """

    reason: str
    note: str = ""


class StoppingRule(Protocol):
    """Says when to stop."""

    def decide(self, progress: Progress) -> Stop | None:
        """Why to stop; ``None``: go on."""
        ...


@dataclass(frozen=True)
class RelativeError:
    """Stop when every site's standard error is below a share of its trace.

    Attributes:
        rtol: the share.
    """

    rtol: float

    def decide(self, progress: Progress) -> Stop | None:
        """See :meth:`StoppingRule.decide`."""
        statistics = progress.statistics
        worst, _ = worst_error(statistics, self.rtol)
        freedom = min(statistics.degrees_of_freedom(s.name) for s in statistics.table)
        return Stop("error") if worst <= self.rtol / _SAFETY and freedom >= _MIN_DEGREES_OF_FREEDOM else None


@dataclass(frozen=True)
class Satisfied:
    """Stop when a function of the traces measured so far says that they will do, such as one that selects a plan.

    Attributes:
        function: asked after step 4 and every 8th.
    """

    function: Callable[[TraceStatistics], bool]

    def decide(self, progress: Progress) -> Stop | None:
        """See :meth:`StoppingRule.decide`."""
        due = progress.steps == _FIRST_LOOK or progress.steps % _LOOK_EVERY == 0
        return Stop("enough") if due and self.function(progress.statistics) else None


@dataclass(frozen=True)
class MaxProbes:
    """Stop before more than so many probes a sample are made.

    Attributes:
        probes: how many.
        rtol: share of a trace below which its standard error makes it significant, for the note.
    """

    probes: int
    rtol: float

    def decide(self, progress: Progress) -> Stop | None:
        """See :meth:`StoppingRule.decide`."""
        if progress.next_probes <= self.probes:
            return None
        worst, name = worst_error(progress.statistics, self.rtol)
        return Stop(
            "max_probes",
            f"Stopped at {progress.probes:.3g} probes an image with a standard error of {worst:.1%} at {name}.",
        )


class AnyOf:
    """Stop as soon as one rule says so; the first that does gives the reason.

    Args:
        *rules: in the order in which they are asked.
    """

    def __init__(self, *rules: StoppingRule) -> None:
        self._rules = rules

    def decide(self, progress: Progress) -> Stop | None:
        """See :meth:`StoppingRule.decide`."""
        return next((stop for rule in self._rules if (stop := rule.decide(progress)) is not None), None)


class AllOf:
    """Stop once all rules say so at the same time; their reasons are joined by ``and``.

    Args:
        *rules: in the order in which they are asked.
    """

    def __init__(self, *rules: StoppingRule) -> None:
        self._rules = rules

    def decide(self, progress: Progress) -> Stop | None:
        """See :meth:`StoppingRule.decide`."""
        stops = [rule.decide(progress) for rule in self._rules]
        if any(stop is None for stop in stops):
            return None
        decided = [stop for stop in stops if stop is not None]
        return Stop(" and ".join(s.reason for s in decided), " ".join(s.note for s in decided if s.note))


def default_rule(config: MeasureConfig, satisfied: Callable[[TraceStatistics], bool] | None = None) -> StoppingRule:
    """Stop at the config's ``rtol``, at its ``max_probes``, or before if a function says that the traces will do."""
    early = [] if satisfied is None else [Satisfied(satisfied)]
    return AnyOf(RelativeError(config.rtol), *early, MaxProbes(config.max_probes, config.rtol))


def worst_error(statistics: TraceStatistics, rtol: float) -> tuple[float, str]:
    """The largest standard error as a share of its trace, over the sites that still matter, and its site.

    A site does not if its upper bound is below the lowest significant mean trace of its kind: bits are chosen as if it
    had that one (see :func:`hawq_lightning.sensitivity.guarded_mean_traces`), however exactly it is known.

    Args:
        statistics: of all processes.
        rtol: share of the trace below which a standard error makes a trace significant here.
    """
    trace = {s.name: statistics.trace(s.name) for s in statistics.table}
    stderr = {s.name: statistics.stderr(s.name) for s in statistics.table}
    lowest: dict[str, float] = {}  # kind -> mean trace
    for s in statistics.table:
        if trace[s.name] > 0 and stderr[s.name] <= rtol * trace[s.name]:
            lowest[s.kind] = min(lowest.get(s.kind, math.inf), trace[s.name] / s.numel)
    worst, name = 0.0, ""
    for s in statistics.table:
        size, error = abs(trace[s.name]), stderr[s.name]
        bound = (size + SIGNIFICANT * error) / s.numel
        # errors are compared by products: a trace may be zero
        if error <= worst * size or bound <= lowest.get(s.kind, 0.0):
            continue
        worst, name = (error / size if size > 0 else math.inf), s.name
    return worst, name
