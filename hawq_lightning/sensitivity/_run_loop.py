"""Run the loop on drawn samples where that is possible and pays, else on whole batches."""

from __future__ import annotations

from hawq_lightning._errors import HawqError
from hawq_lightning.sensitivity._importance_sampler import NotDrawableError, importance_sampler
from hawq_lightning.sensitivity._probe_runner import ProbeRunner, WholeBatches
from hawq_lightning.sensitivity._sampling import pays_off
from hawq_lightning.sensitivity._statistics import TraceStatistics
from hawq_lightning.sensitivity._trace_loop import Sampling, TraceLoop


def run_loop(
    loop: TraceLoop, runner: ProbeRunner, kind: str, statistics: TraceStatistics
) -> tuple[Sampling, TraceStatistics]:
    """Measure, by the sampling of the config; what cannot be drawn from is begun again with whole batches.

    Args:
        loop: with everything but the sampling.
        runner: how a batch is probed.
        kind: ``all``, ``curvature`` or ``auto``, which draws where it promises to save a third of the work.
        statistics: an empty table.

    Returns:
        the sampling that was used, and the statistics of all processes.

    Raises:
        HawqError: ``curvature``, and samples cannot be drawn.
    """
    whole = WholeBatches(runner, loop.data)
    if kind == "all":
        return whole, loop.run(whole, statistics)
    try:
        drawn = importance_sampler(runner, loop.data, loop.progress)
        if kind == "curvature" or pays_off(drawn.design):
            return drawn, loop.run(drawn, statistics.fresh())
    except NotDrawableError as reason:
        if kind == "curvature":
            raise HawqError(f"sampling='curvature' is impossible: {reason}; use 'auto' or 'all'.") from None
    return whole, loop.run(whole, statistics)
