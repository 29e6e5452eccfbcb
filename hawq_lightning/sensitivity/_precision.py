"""Probes in bfloat16, where they agree with those in float32."""

from __future__ import annotations

import dataclasses

from hawq_lightning.sensitivity._context import MeasureContext
from hawq_lightning.sensitivity._estimator import Estimator, Pilot, ProbeRequest
from hawq_lightning.sensitivity._ggn import gauss_newton_probes

_AGREE = 0.05  # share of a trace: the standard error that measurements usually stop at


def in_precision(
    context: MeasureContext, estimator: Estimator, pilot: Pilot, precision: str, seed: int
) -> MeasureContext:
    """A context whose passes run in ``precision``, where the estimator may and a probe agrees with float32.

    A probe of the pilot with the same signs must give every site's trace within 5%; else a note names the worst.

    Args:
        context: in float32.
        estimator: prepared.
        pilot: samples to try it on.
        precision: ``float32`` or ``bf16``.
        seed: of the signs.
    """
    if precision == context.precision:
        return context
    diagnostics = context.diagnostics
    if not estimator.low_precision:
        diagnostics.warn_once(f"precision={precision!r} is for Gauss-Newton probes; float32 was used.")
        return context
    request = ProbeRequest(pilot.batch, pilot.samples, pilot.per_sample, [(pilot.samples, seed)], 1)
    low = dataclasses.replace(context, precision=precision)
    # rotations may turn by themselves from one precision to the other
    reference, cast = (gauss_newton_probes(c, request, rotate=False).rows[0] for c in (context, low))
    worst, name = 0.0, ""
    for site, rows in reference.items():
        here, there = float(rows.sum()), float(cast[site].sum())
        off = abs(there - here) / abs(here) if here else float(there != 0)
        if not off <= worst:  # NaN counts as the worst
            worst, name = off, site
    if worst <= _AGREE:
        diagnostics.warn_once(
            f"Traces are of bfloat16 passes: one probe agreed with float32 within {worst:.1%} ({name})."
        )
        return low
    diagnostics.warn_once(f"bfloat16 moved the trace of {name} by {worst:.1%}, so float32 was used.")
    return context
