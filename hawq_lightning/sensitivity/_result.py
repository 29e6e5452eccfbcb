"""What a measurement leaves behind: one record a site, and the rows that the records summarise."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from hawq_lightning._errors import HawqError, nearest
from hawq_lightning._io import read_json, write_text
from hawq_lightning._types import JsonObject

FORMAT = "hawq_lightning.sensitivity"
VERSION = 1


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


@dataclass(frozen=True)
class Sensitivity:
    """Traces of every site. Iterating gives :class:`SiteTrace` records, weights first.

    Attributes:
        records: in network order.
        rows: site name -> one trace a row; a row is a sample, or a batch where samples cannot be told apart. The
            weighted mean of the rows is the trace.
        sizes: activation site name -> elements of each row's activation.
        row_weights: of each row in every mean; ``None``: all equal.
        row_unit: site name -> ``image`` or ``batch``.
        settings: estimator, probes, images, seed, seconds and the like.
        notes: what the user should know, in sentences.
        fingerprint: of weights, data and settings.
    """

    records: tuple[SiteTrace, ...]
    rows: Mapping[str, Sequence[float]] = field(default_factory=dict)
    sizes: Mapping[str, Sequence[float]] = field(default_factory=dict)
    row_weights: Mapping[str, Sequence[float]] = field(default_factory=dict)
    row_unit: Mapping[str, str] = field(default_factory=dict)
    settings: JsonObject = field(default_factory=dict)
    notes: Sequence[str] = ()
    fingerprint: str = ""

    def __iter__(self) -> Iterator[SiteTrace]:
        return iter(self.records)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, name: str) -> SiteTrace:
        """The record of the site called ``name``."""
        for record in self.records:
            if record.name == name:
                return record
        raise HawqError(f"No trace was measured for {name!r}.{nearest(name, [r.name for r in self.records])}")

    def __contains__(self, name: object) -> bool:
        return any(r.name == name for r in self.records)

    def to_dict(self) -> JsonObject:
        """Plain JSON types."""

        def short(table: Mapping[str, Sequence[float]]) -> dict[str, list[float]]:
            return {k: [float(f"{x:.7g}") for x in v] for k, v in table.items()}

        return {
            "format": FORMAT,
            "version": VERSION,
            "records": [_finite(asdict(r)) for r in self.records],
            "settings": dict(self.settings),
            "notes": list(self.notes),
            "fingerprint": self.fingerprint,
            "row_unit": dict(self.row_unit),
            "rows": short(self.rows),
            "sizes": short(self.sizes),
            "row_weights": short(self.row_weights),
        }

    @classmethod
    def from_dict(cls, data: object) -> Sensitivity:
        """Read what :meth:`to_dict` wrote.

        Raises:
            HawqError: not a sensitivity file, an unknown version, or damaged fields.
        """
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise HawqError(f'This is not a sensitivity file: expected a JSON object with "format": "{FORMAT}".')
        if data.get("version") != VERSION:
            raise HawqError(f"Sensitivity version {data.get('version')!r} is unknown; this release reads {VERSION}.")
        try:
            records = tuple(_record(r) for r in data["records"])
            for r in records:
                if r.kind not in ("weight", "activation") or not math.isfinite(r.trace) or r.numel < 1:
                    raise ValueError(f"site {r.name!r} has kind {r.kind!r}, trace {r.trace!r}, numel {r.numel!r}")
            tables = {
                key: {str(k): [float(x) for x in v] for k, v in data.get(key, {}).items()}
                for key in ("rows", "sizes", "row_weights")
            }
            return cls(
                records=records,
                settings=dict(data.get("settings", {})),
                notes=tuple(map(str, data.get("notes", ()))),
                fingerprint=str(data.get("fingerprint", "")),
                row_unit={str(k): str(v) for k, v in data.get("row_unit", {}).items()},
                **tables,
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise HawqError(f"The sensitivity file is damaged: {type(error).__name__}: {error}.") from error

    def save(self, path: str | Path) -> None:
        """Write JSON, atomically."""
        write_text(path, json.dumps(self.to_dict()))

    @classmethod
    def load(cls, path: str | Path) -> Sensitivity:
        """Read JSON written by :meth:`save`.

        Raises:
            HawqError: no such file, no JSON, or damaged.
        """
        return cls.from_dict(read_json(path, "sensitivity file"))


def _finite(record: JsonObject) -> JsonObject:
    # JSON has no infinity: an infinite error is null
    return {k: None if isinstance(v, float) and math.isinf(v) else v for k, v in record.items()}


def _record(raw: JsonObject) -> SiteTrace:
    values: JsonObject = {k: math.inf if v is None else v for k, v in raw.items()}
    return SiteTrace(**values)
