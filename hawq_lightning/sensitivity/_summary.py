"""From statistics to the result: records, rows, settings, and what the user should know."""

from __future__ import annotations

from collections.abc import Sequence

from hawq_lightning._config import MeasureConfig
from hawq_lightning._errors import HawqError, some
from hawq_lightning._types import JsonObject
from hawq_lightning.sensitivity._context import Diagnostics
from hawq_lightning.sensitivity._probe_runner import ProbeRunner
from hawq_lightning.sensitivity._result import Sensitivity
from hawq_lightning.sensitivity._result_fields import SiteTrace
from hawq_lightning.sensitivity._statistics import TraceStatistics
from hawq_lightning.sensitivity._trace_loop import Sampling


def to_sensitivity(
    statistics: TraceStatistics,
    fingerprint: str,
    *,
    exact: bool = False,
    settings: JsonObject | None = None,
    notes: Sequence[str] = (),
) -> Sensitivity:
    """The result of a measurement, or of as much of it as there is.

    Args:
        statistics: of all processes.
        fingerprint: of the measurement.
        exact: the traces have no error.
        settings: for the record.
        notes: for the user.
    """
    unit = statistics.per_sample
    return Sensitivity(
        records=statistics.records(exact),
        rows={n: statistics.means(n).tolist() for n in statistics.mean},
        sizes={n: statistics.filled_sizes(n).tolist() for n in statistics.size},
        row_weights={n: t.tolist() for n, t in statistics.weight.items() if not unit[n]},
        row_unit={n: "image" if per_sample else "batch" for n, per_sample in unit.items()},
        settings=settings or {},
        notes=tuple(notes),
        fingerprint=fingerprint,
    )


def settings_record(
    config: MeasureConfig,
    runner: ProbeRunner,
    sampling: Sampling,
    statistics: TraceStatistics,
    stopped: str,
    seconds: float,
) -> JsonObject:
    """What ``sensitivity.json`` tells of how it came about; its names are those of release 0.1.0.

    Args:
        config: of the call.
        runner: with the estimator and the precision that were used.
        sampling: that was used.
        statistics: of all processes.
        stopped: the reason.
        seconds: that it took.
    """
    data = sampling.data
    return {
        "estimator": runner.estimator.name, "estimator_asked": config.estimator, "l1": config.l1_curvature,
        "rtol": config.rtol, "seed": config.seed, "images": sum(data.samples), "batches": len(data.batches),
        "probes": statistics.probes, "distribution": config.distribution, "seconds": round(seconds, 3),
        "processes": data.shard.world, "stopped": stopped,
        "precision": runner.context.precision,
    } | runner.context.diagnostics.figures | sampling.record(statistics.probes)  # fmt: skip


def check_rows(statistics: TraceStatistics, diagnostics: Diagnostics) -> None:
    """Say where a single row leaves the error by the choice of images unknown."""
    if single := [n for n, mean in statistics.mean.items() if len(mean) < 2]:
        images = sum(statistics.samples)
        what = "one image" if images < 2 else f"one batch of {images} images that cannot be told apart"
        where = "" if len(single) == len(statistics.mean) else f" at {len(single)} of {len(statistics.mean)} sites"
        diagnostics.warn_once(
            f"Traces are of {what}{where}: how much other images would change them is not known (stderr_data is "
            "infinite). Measure two batches or more."
        )


def check_curvature(records: Sequence[SiteTrace], diagnostics: Diagnostics) -> None:
    """Name the sites without curvature.

    Raises:
        HawqError: there is none anywhere.
    """
    flat = [r.name for r in records if r.trace == 0]
    if len(flat) == len(records):
        raise HawqError(
            "The loss has no curvature in any layer's output: it is flat there (a softmax whose probabilities are all "
            "0 or 1), linear, forbids a second derivative, or does not depend on the layers."
        )
    if flat:
        diagnostics.warn_once(f"The loss has zero curvature at {some(flat)}.")
