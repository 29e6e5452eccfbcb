"""Probes in bfloat16, where they agree with those in float32."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from hawq_lightning._errors import HawqError, nearest
from hawq_lightning.sensitivity._context import MeasureContext
from hawq_lightning.sensitivity._ggn import RademacherProbes, probe_batch

PRECISIONS = ("float32", "bf16")
_AGREE = 0.05


def check_precision(precision: str) -> str:
    """Return ``precision``, or raise HawqError unless it is one of :data:`PRECISIONS`."""
    if precision not in PRECISIONS:
        raise HawqError(
            f"Unknown precision {precision!r}; use 'float32' or 'bf16'.{nearest(str(precision), PRECISIONS)}"
        )
    return precision


def settle_precision(
    setting: MeasureContext, batch: Any, images: int, per_image: Mapping[str, bool], seed: int
) -> None:
    """Keep ``setting.precision`` if a probe of ``batch`` with the same signs gives the same traces in float32.

    Every site's trace must agree within 5%. Otherwise float32 is set, and a note names the site.
    """
    if setting.precision == "float32":
        return
    signs = RademacherProbes([(images, seed)])
    # rotations may turn by themselves from one precision to the other
    plain, cast = (
        probe_batch(dataclasses.replace(setting, precision=p), batch, images, per_image, signs, 1, rotate=False).rows[0]
        for p in ("float32", setting.precision)
    )
    worst, name = 0.0, ""
    for site, rows in plain.items():
        here, there = float(rows.sum()), float(cast[site].sum())
        off = abs(there - here) / abs(here) if here else float(there != 0)
        if not off <= worst:
            worst, name = off, site
    if worst <= _AGREE:
        setting.note(f"Traces are of bfloat16 passes: one probe agreed with float32 within {worst:.1%} ({name}).")
    else:
        setting.note(f"bfloat16 moved the trace of {name} by {worst:.1%}, so float32 was used.")
        setting.precision = "float32"
