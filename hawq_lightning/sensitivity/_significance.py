"""What a trace cannot see: a site whose trace is not significantly positive must not silently get the fewest bits."""

from __future__ import annotations

from hawq_lightning.sensitivity._result import Sensitivity
from hawq_lightning.sensitivity._result_fields import SiteTrace

SIGNIFICANT = 2.0  # standard errors


def guarded_mean_traces(sensitivity: Sensitivity) -> tuple[dict[str, float], tuple[str, ...]]:
    """Mean traces to choose bits by.

    A significant one stays as measured. Otherwise (zero curvature, a concave loss, noise) it is the larger of its
    upper bound, trace + 2 stderr, and the lowest significant mean trace of its kind.

    Returns:
        site -> mean trace >= 0, and one sentence for each site that was floored.
    """
    significant = {
        k: [r.mean_trace for r in sensitivity if r.kind == k and _significant(r)] for k in ("weight", "activation")
    }
    out, notes = {}, []
    for r in sensitivity:
        if _significant(r):
            out[r.name] = r.mean_trace
            continue
        bound = max(0.0, (r.trace + SIGNIFICANT * r.stderr) / r.numel)
        out[r.name] = max(bound, min(significant[r.kind], default=bound))
        notes.append(
            f"{r.name}: trace {r.trace:.2g} with standard error {r.stderr:.2g} is not significantly positive; "
            f"bits are chosen as if its mean trace were {out[r.name]:.2g}."
        )
    return out, tuple(notes)


def _significant(record: SiteTrace) -> bool:
    return record.trace > SIGNIFICANT * record.stderr and record.trace > 0
