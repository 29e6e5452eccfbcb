"""A selection problem's parts from plain numbers, made anywhere."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hawq_lightning._errors import HawqError
from hawq_lightning._plan import Candidate
from hawq_lightning._site_table import Site
from hawq_lightning.selection._checks import whole_number
from hawq_lightning.selection._pareto import Floats
from hawq_lightning.sensitivity import Sensitivity, SiteTrace

Rows = Sequence[Sequence[float]] | Floats


def parts_from_arrays(
    names: Sequence[str],
    bits: Sequence[int] | Sequence[Sequence[int]],
    omega: Rows,
    numel: Sequence[int],
    mean_trace: Sequence[float] | None = None,
    perturbation: Rows | None = None,
) -> tuple[tuple[Site, ...], dict[str, list[Candidate]], Sensitivity | None]:
    """Weight sites, their candidates, and their traces where there are any.

    The arguments are those of :meth:`hawq_lightning.selection.Problem.from_arrays`.

    Raises:
        HawqError: lengths that differ, or numbers that are not whole.
    """
    count = len(names)
    rows = [[float(x) for x in row] for row in omega]
    shared = [
        whole_number(b, "a width in bits") for b in bits if not isinstance(b, (Sequence, np.ndarray))
    ]  # one list for all sites
    nested = [
        [whole_number(b, "a width in bits") for b in row] for row in bits if isinstance(row, (Sequence, np.ndarray))
    ]
    if shared and nested:
        raise HawqError("bits must be one list of widths for all sites, or one list a site; not both.")
    widths = [shared] * count if shared else nested
    lengths = {"bits": len(widths), "omega": len(rows), "numel": len(numel)}
    if mean_trace is not None:
        lengths["mean_trace"] = len(mean_trace)
    for what, length in lengths.items():
        if length != count:
            raise HawqError(f"There are {count} names but {length} rows of {what}.")
    candidates: dict[str, list[Candidate]] = {}
    for i, name in enumerate(names):
        if len(widths[i]) != len(rows[i]):
            raise HawqError(f"Site {name!r} has {len(widths[i])} widths but {len(rows[i])} values of omega.")
        errors = [0.0] * len(rows[i]) if perturbation is None else [float(x) for x in perturbation[i]]
        candidates[name] = [
            Candidate(b, "midrise" if b == 1 else "affine", o, p) for b, o, p in zip(widths[i], rows[i], errors)
        ]
    elements = [whole_number(k, f"numel of {n!r}") for n, k in zip(names, numel)]
    sites = tuple(Site(n, "weight", (n,), (k,), k, 0) for n, k in zip(names, elements))
    sensitivity = None
    if mean_trace is not None:
        records = [
            SiteTrace(n, "weight", float(t) * k, 0.0, 0.0, k, float(t)) for n, t, k in zip(names, mean_trace, elements)
        ]
        sensitivity = Sensitivity(tuple(records))
    return sites, candidates, sensitivity
