"""The records and tables of a sensitivity file, each field checked."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields

from hawq_lightning._errors import HawqError
from hawq_lightning._fields import CHECKSUM, check_names, number, sequence, shown, table, text, whole
from hawq_lightning._types import JsonObject
from hawq_lightning.sensitivity._rounding import read_forms

_KINDS = ("weight", "activation")
_UNITS = ("image", "batch")
_TABLES = ("rows", "sizes", "row_weights")
_MOST_ELEMENTS = 1 << 40


@dataclass(frozen=True)
class SiteTrace:
    """The Hessian trace of one site.

    Attributes:
        name: of the site.
        kind: ``weight`` or ``activation``.
        trace: of the mean loss for weights (eq. 6); of one image's loss averaged over images for activations (eq. 9).
        stderr: standard error against the exact trace on the same images.
        stderr_data: with the sampling of the images from their population added.
        numel: elements of the weight, or of one image's activation.
        mean_trace: trace over elements; for activations the division is inside the mean over images.
    """

    name: str
    kind: str
    trace: float
    stderr: float
    stderr_data: float
    numel: int
    mean_trace: float


def read_fields(data: JsonObject) -> JsonObject:
    """Arguments of :class:`Sensitivity` from what its file holds.

    Args:
        data: the JSON object.

    Raises:
        HawqError: a field that is unknown, missing, of another type, out of range, or at odds with another; the message
            names it.
    """
    check_names(
        data, "it", ("format", "version", "records"),
        (CHECKSUM, "settings", "notes", "fingerprint", "data", "row_unit", "forms", *_TABLES),
    )  # fmt: skip
    records = tuple(_record(r, i) for i, r in enumerate(sequence(data["records"], "records")))
    kinds = {r.name: r.kind for r in records}
    if len(kinds) < len(records):
        names = [r.name for r in records]
        raise HawqError(f"site {next(n for n in names if names.count(n) > 1)!r} is there twice")
    unit = {n: text(u, f"row_unit of {n!r}") for n, u in _by_site(data, "row_unit", kinds).items()}
    for name, value in unit.items():
        if value not in _UNITS:
            raise HawqError(f"row_unit of {name!r} is {shown(value)}; it must be image or batch")
    tables = {key: _table(data, key, kinds) for key in _TABLES}
    _check_tables(tables, kinds, unit)
    return {
        "records": records,
        "settings": table(data.get("settings", {}), "settings"),
        "notes": tuple(text(n, f"note {i}") for i, n in enumerate(sequence(data.get("notes", []), "notes"))),
        "fingerprint": text(data.get("fingerprint", ""), "fingerprint"),
        "data": text(data.get("data", ""), "data"),
        "row_unit": unit,
        "forms": read_forms(data, kinds),
        **tables,
    }


def _record(raw: object, position: int) -> SiteTrace:
    data = table(raw, f"record {position}")
    check_names(data, f"record {position}", [f.name for f in fields(SiteTrace)])
    name = text(data["name"], f"name of record {position}")
    if not name:
        raise HawqError(f"record {position} has an empty name")
    kind = text(data["kind"], f"kind of {name!r}")
    if kind not in _KINDS:
        raise HawqError(f"kind of {name!r} is {shown(kind)}; it must be weight or activation")
    return SiteTrace(
        name,
        kind,
        number(data["trace"], f"trace of {name!r}"),
        _error(data["stderr"], f"stderr of {name!r}"),
        _error(data["stderr_data"], f"stderr_data of {name!r}"),
        whole(data["numel"], f"numel of {name!r}", 1, _MOST_ELEMENTS),
        number(data["mean_trace"], f"mean_trace of {name!r}"),
    )


def _error(value: object, what: str) -> float:
    # null where it is not known; release 0.1.0 also wrote Infinity and NaN
    if value is None or (isinstance(value, float) and (math.isnan(value) or value == math.inf)):
        return math.inf
    return number(value, what, low=0.0)


def _by_site(data: JsonObject, key: str, kinds: Mapping[str, str]) -> JsonObject:
    values = table(data.get(key, {}), key)
    for name in values:
        if name not in kinds:
            raise HawqError(f"{key} has site {shown(name)}, of which there is no record")
    return values


def _table(data: JsonObject, key: str, kinds: Mapping[str, str]) -> dict[str, list[float]]:
    """One list of numbers a site."""
    low = -math.inf if key == "rows" else 0.0
    out = {}
    for name, values in _by_site(data, key, kinds).items():
        what = f"{key} of {name!r}"
        out[name] = [number(x, what, low) for x in sequence(values, what)]
    return out


def _check_tables(
    tables: Mapping[str, Mapping[str, list[float]]], kinds: Mapping[str, str], unit: Mapping[str, str]
) -> None:
    """Rows of every site or of none, as many as sizes and weights, and as many as other sites of the same unit have."""
    rows = tables["rows"]
    if rows:
        for name in kinds:
            if name not in rows:
                raise HawqError(f"there are rows of other sites, but none of {name!r}")
    counts: dict[str, int] = {}
    for name, values in rows.items():
        if not values:
            raise HawqError(f"rows of {name!r} is empty")
        if name in unit and counts.setdefault(unit[name], len(values)) != len(values):
            raise HawqError(f"rows of {name!r} are {len(values)}, of other sites {counts[unit[name]]}")
    for key in ("sizes", "row_weights"):
        for name, values in tables[key].items():
            if len(values) != len(rows.get(name, ())):
                raise HawqError(f"{key} of {name!r} are {len(values)}, its rows {len(rows.get(name, ()))}")
            if sum(values) <= 0 or (key == "sizes" and min(values) <= 0):
                raise HawqError(f"{key} of {name!r} must be positive")
    for name in tables["sizes"]:
        if kinds[name] != "activation":
            raise HawqError(f"sizes of {name!r} are given, which is no activation")
