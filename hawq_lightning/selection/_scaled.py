"""Candidates and traces had the traces of some sites been larger or smaller."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from hawq_lightning._candidates import Candidates
from hawq_lightning._plan import Candidate
from hawq_lightning.sensitivity import Sensitivity, SiteTrace

Factors = Mapping[str, float]
"""Site name -> what its trace is multiplied by; 1 where it is missing."""


def scaled_candidates(
    candidates: Mapping[str, Sequence[Candidate]], factors: Factors
) -> Mapping[str, tuple[Candidate, ...]]:
    """With the Ω of the multiplied traces; of the same quantizer, where they tell it."""
    scaled = {name: tuple(_with_factor(c, factors.get(name, 1.0)) for c in cs) for name, cs in candidates.items()}
    return replace(candidates, by_site=scaled) if isinstance(candidates, Candidates) else scaled


def scaled_traces(sensitivity: Sensitivity, factors: Factors) -> Sensitivity:
    """With the multiplied traces and their standard errors."""
    records = tuple(_record_with_factor(r, factors.get(r.name, 1.0)) for r in sensitivity)
    return replace(sensitivity, records=records)


def _with_factor(candidate: Candidate, factor: float) -> Candidate:
    if not math.isfinite(candidate.omega):  # not available, whatever the trace
        return candidate
    return replace(candidate, omega=candidate.omega * factor)


def _record_with_factor(record: SiteTrace, factor: float) -> SiteTrace:
    return replace(
        record, trace=record.trace * factor, mean_trace=record.mean_trace * factor,
        stderr=_times(record.stderr, factor), stderr_data=_times(record.stderr_data, factor),
    )  # fmt: skip


def _times(error: float, factor: float) -> float:
    """An unknown error stays so: infinity times 0 is no number."""
    return error * factor if math.isfinite(error) else error
