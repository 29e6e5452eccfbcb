"""What a trace cannot see: a site whose trace is not significantly positive must not silently get the fewest bits."""

from __future__ import annotations

import math
from collections.abc import Sequence

from hawq_lightning._errors import HawqError, some
from hawq_lightning.sensitivity._result import Sensitivity
from hawq_lightning.sensitivity._result_fields import SiteTrace

SIGNIFICANT = 2.0  # standard errors
_KINDS = ("weight", "activation")
_NAMED = 3  # sites in a sentence; sensitivity.json has all of them


def guarded_mean_traces(sensitivity: Sensitivity) -> tuple[dict[str, float], tuple[str, ...]]:
    """Mean traces to choose bits by.

    A significant one stays as measured. Otherwise (zero curvature, a concave loss, noise) it is the larger of its
    upper bound, trace + 2 stderr, and the lowest significant mean trace of its kind. Where a kind has no significant
    trace at all, all its sites get the same: Ω then ranks by perturbation alone.

    Returns:
        site -> mean trace >= 0, and one sentence for each kind that has floored sites.

    Raises:
        HawqError: a trace is no number.
    """
    _check_numbers(sensitivity)
    lowest = {k: min((r.mean_trace for r in _significant_of(sensitivity, k)), default=0.0) for k in _KINDS}
    out, notes = {}, []
    common = {k: _common(_of_kind(sensitivity, k)) or max(lowest.values()) or 1.0 for k in kinds_in_noise(sensitivity)}
    for kind, value in common.items():
        records = _of_kind(sensitivity, kind)
        notes.append(
            f"The {kind} traces ({len(records)}) say nothing: none is significantly positive. Bits of {kind}s are "
            f"chosen by size of their quantization error alone, as if every mean trace were {value:.2g}."
        )
    for r in sensitivity:
        if _significant(r):
            out[r.name] = r.mean_trace
        else:
            out[r.name] = common.get(r.kind, max(_upper_bound(r), lowest[r.kind]))
    for kind in [k for k in _KINDS if k not in common]:
        records = _of_kind(sensitivity, kind)
        if floored := [r for r in records if not _significant(r)]:
            notes.append(_sentence(kind, floored, len(records), [out[r.name] for r in floored]))
    return out, tuple(notes)


def _sentence(kind: str, floored: Sequence[SiteTrace], of: int, values: Sequence[float]) -> str:
    """About sites of one kind that are taken for more sensitive than their traces say."""
    sites = some([f"{r.name} {r.trace:.2g} with standard error {r.stderr:.2g}" for r in floored], _NAMED)
    low, high = f"{min(values):.2g}", f"{max(values):.2g}"
    return (
        f"{len(floored)} of {of} {kind} traces {'is' if len(floored) == 1 else 'are'} not significantly positive "
        f"({sites}): bits are chosen there as if the mean trace were {low}"
        f"{'' if low == high else f' to {high}'}."
    )


def kinds_in_noise(sensitivity: Sensitivity) -> tuple[str, ...]:
    """Those of ``weight`` and ``activation`` that have sites, none with a significantly positive trace."""
    return tuple(k for k in _KINDS if _of_kind(sensitivity, k) and not _significant_of(sensitivity, k))


def _of_kind(sensitivity: Sensitivity, kind: str) -> list[SiteTrace]:
    return [r for r in sensitivity if r.kind == kind]


def _significant_of(sensitivity: Sensitivity, kind: str) -> list[SiteTrace]:
    return [r for r in _of_kind(sensitivity, kind) if _significant(r)]


def _common(records: Sequence[SiteTrace]) -> float:
    """The largest upper bound; of traces that are all significantly negative their largest size."""
    return max(map(_upper_bound, records)) or max((abs(r.trace) + SIGNIFICANT * _error(r)) / r.numel for r in records)


def _upper_bound(record: SiteTrace) -> float:
    return max(0.0, (record.trace + SIGNIFICANT * _error(record)) / record.numel)


def _error(record: SiteTrace) -> float:
    return record.stderr if math.isfinite(record.stderr) else abs(record.trace)  # a single probe tells none


def _significant(record: SiteTrace) -> bool:
    return record.trace > SIGNIFICANT * record.stderr and record.trace > 0


def _check_numbers(sensitivity: Sensitivity) -> None:
    for r in sensitivity:
        rows = sensitivity.rows.get(r.name, ())
        if not all(map(math.isfinite, (r.trace, r.mean_trace, *rows))) or math.isnan(r.stderr):
            raise HawqError(f"The trace of site {r.name!r} is not a finite number; measure it again, or exclude it.")
