"""What a measurement leaves behind: one record a site, and the rows that the records summarise."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from hawq_lightning._errors import HawqError, nearest
from hawq_lightning._fields import sealed, shown
from hawq_lightning._io import TRACES_JSON, json_text, with_infinity, without_infinity, write_text
from hawq_lightning._sealed import load_sealed, read_sealed
from hawq_lightning._types import JsonObject
from hawq_lightning.sensitivity._result_fields import SiteTrace, read_fields
from hawq_lightning.sensitivity._rounding import QuadraticForm

FORMAT = "hawq_lightning.sensitivity"
VERSION = 1


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
        forms: site name -> quadratic form of the rounding error of each of its candidates, if they were measured.
        data: hash of the batches that it was measured on, see :func:`batches_digest`; empty: not known.
    """

    records: tuple[SiteTrace, ...]
    rows: Mapping[str, Sequence[float]] = field(default_factory=dict)
    sizes: Mapping[str, Sequence[float]] = field(default_factory=dict)
    row_weights: Mapping[str, Sequence[float]] = field(default_factory=dict)
    row_unit: Mapping[str, str] = field(default_factory=dict)
    settings: JsonObject = field(default_factory=dict)
    notes: Sequence[str] = ()
    fingerprint: str = ""
    forms: Mapping[str, Sequence[QuadraticForm]] = field(default_factory=dict)
    data: str = ""

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

        forms = {name: [f.to_dict() for f in forms] for name, forms in self.forms.items()}
        data: JsonObject = {"data": self.data} if self.data else {}
        return (
            {
                "format": FORMAT,
                "version": VERSION,
                "records": [_with_null(asdict(r)) for r in self.records],
                "settings": without_infinity(dict(self.settings)),
                "notes": list(self.notes),
                "fingerprint": self.fingerprint,
                "row_unit": dict(self.row_unit),
                "rows": short(self.rows),
                "sizes": short(self.sizes),
                "row_weights": short(self.row_weights),
            }
            | data
            | ({"forms": forms} if forms else {})
        )

    @classmethod
    def from_dict(cls, data: object) -> Sensitivity:
        """Read what :meth:`to_dict` wrote; every field is checked.

        Raises:
            HawqError: not a sensitivity file, an unknown version, or a field that cannot be; the message names it.
        """
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise HawqError(f'This is not a sensitivity file: expected a JSON object with "format": "{FORMAT}".')
        if type(data.get("version")) is not int or data["version"] != VERSION:
            raise HawqError(
                f"Sensitivity version {shown(data.get('version'))} is unknown; this release reads {VERSION}."
            )
        try:
            fields = read_fields(data)
            return cls(**fields | {"settings": with_infinity(fields["settings"])})
        except HawqError as error:
            raise HawqError(f"The sensitivity file is damaged: {error}.") from error

    def save(self, path: str | Path) -> None:
        """Write JSON, atomically, with a checksum of what it says."""
        write_text(path, json_text(sealed(self.to_dict())))

    @classmethod
    def load(cls, path: str | Path) -> Sensitivity:
        """Read JSON written by :meth:`save`, or by hand; warns of a file that was changed since it was written.

        Raises:
            HawqError: no such file, no JSON, or damaged; the message names file and field.
        """
        return load_sealed(path, "sensitivity file", cls.from_dict, TRACES_JSON)

    @classmethod
    def read(cls, path: str | Path) -> tuple[Sensitivity, bool]:
        """What :meth:`load` gives, and whether the file was changed since it was written.

        Raises:
            HawqError: see :meth:`load`.
        """
        return read_sealed(path, "sensitivity file", cls.from_dict, TRACES_JSON)


def _with_null(record: JsonObject) -> JsonObject:
    # an error that is not known is null
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
