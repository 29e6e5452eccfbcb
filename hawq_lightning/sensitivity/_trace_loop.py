"""Step after step of probes, until a rule says stop; resumable."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from hawq_lightning._progress import progress_bar
from hawq_lightning.sensitivity._batch_set import BatchSet
from hawq_lightning.sensitivity._checkpoint import MeasurementCheckpoint
from hawq_lightning.sensitivity._estimator import Estimator
from hawq_lightning.sensitivity._statistics import TraceStatistics
from hawq_lightning.sensitivity._stopping import Progress, Stop, StoppingRule, worst_error


class Sampling(Protocol):
    """Which samples a step probes, and what it adds to the statistics.

    Attributes:
        data: all batches.
        report_every: steps after which the progress bar shows the error.
    """

    data: BatchSet
    report_every: int

    @property
    def probes_per_step(self) -> int:
        """Random vectors that a sample gets in a step that takes it."""
        ...

    @property
    def work(self) -> float:
        """Samples that a step takes on average, as a share of all."""
        ...

    def step(self, number: int, statistics: TraceStatistics, first: int, after: Callable[[int], None]) -> None:
        """Add one step's rows to ``statistics``.

        Args:
            number: of the step.
            statistics: gets the rows.
            first: this process's batches that the step has already.
            after: called with their number whenever it has grown.
        """
        ...

    def record(self, probes: int) -> dict[str, object]:
        """What the result's settings say of it.

        Args:
            probes: random vectors that a sample got that every step took.
        """
        ...


@dataclass
class TraceLoop:
    """Runs steps of a sampling until a rule has a reason to stop.

    Attributes:
        data: all batches.
        estimator: prepared.
        rule: asked whenever the estimates are unbiased.
        checkpoint: of the unfinished measurement.
        progress: show a bar, with the error of the worst site.
        rtol: share of a trace below which its standard error makes it significant, for that figure.
        stopped: why, once it has run.
    """

    data: BatchSet
    estimator: Estimator
    rule: StoppingRule
    checkpoint: MeasurementCheckpoint
    progress: bool
    rtol: float
    stopped: Stop = field(default=Stop(""), init=False)

    def run(self, sampling: Sampling, statistics: TraceStatistics) -> TraceStatistics:
        """Fill ``statistics``, an empty one, with this process's rows.

        Returns:
            the sum over processes.
        """
        local, shard = len(self.data.local), self.data.shard
        position = self.checkpoint.restore(statistics)
        step, done, started = position.step, position.done, position.started
        with progress_bar("Hessian traces", local, self.progress) as advance:
            while True:
                if step and not started:  # a step has ended, here or before an interruption
                    total = statistics.summed(shard, sampling.probes_per_step * step)
                    total.check_finite()
                    if self.estimator.exact:
                        self.stopped = Stop("exact")
                        return total
                    # within a period estimates are biased: the concave part has been counted too often or not yet
                    if total.probes % self.estimator.period == 0:
                        stop = self.rule.decide(self._progress(sampling, total, step))
                        if stop is not None:
                            self.stopped = stop
                            return total
                        if step % sampling.report_every == 0:
                            worst, name = worst_error(total, self.rtol)
                            advance(0, f"Hessian traces, error {worst:.1%} at {name}")

                def after(batches: int, step: int = step) -> None:
                    advance(batches)
                    self.checkpoint.save(statistics, step, batches)

                sampling.step(step, statistics, done, after)
                step, done, started = step + 1, 0, False
                self.checkpoint.save(statistics, step, 0)

    def _progress(self, sampling: Sampling, total: TraceStatistics, step: int) -> Progress:
        work = float(sampling.probes_per_step * sampling.work)  # probes a sample in a step, on average
        ahead = max(1, self.estimator.period // sampling.probes_per_step)
        return Progress(total, step, work * step, work * (step + ahead))
