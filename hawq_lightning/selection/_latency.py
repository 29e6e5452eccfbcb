"""Latency from a table that somebody measured: layer or shape, bits -> milliseconds."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from hawq_lightning._csv import cell_text
from hawq_lightning._errors import HawqError, nearest
from hawq_lightning._site_table import Layer

_NAME = ("layer", "site", "name", "shape", "type")
_WEIGHT = ("weight_bits", "w_bits", "bits")
_ACTIVATION = ("activation_bits", "a_bits")
_UNIT = {"ms": 1.0, "us": 1e-3, "s": 1e3, "latency_ms": 1.0}


class LatencyTable:
    """Milliseconds of a layer for its weight and activation bits.

    A row names what it is about in a column ``layer`` (or ``site``, ``name``): a layer's name, its weight site's name,
    or a weight shape such as ``64x3x7x7``; a column ``shape``, with or without ``type``, does the same for every layer
    of that kind. Then ``weight_bits`` (or ``bits``), optionally ``activation_bits`` (else it holds for all), and
    ``ms``, ``us`` or ``s``. A width that the table lacks for a layer does not exist on the device.
    """

    def __init__(self, rows: Iterable[Mapping[str, Any]], source: str = "the latency table") -> None:
        self.source = source
        self._rows: dict[tuple[str, str, str], dict[tuple[int, int | None], float]] = {}
        for line, row in enumerate(rows, start=2):
            row = {str(k).strip(): v for k, v in row.items() if v not in (None, "")}
            name = next((str(row[k]).strip() for k in _NAME[:3] if k in row), "")
            key = (name, str(row.get("type", "")).strip(), _shape(str(row.get("shape", ""))))
            weight = next((row[k] for k in _WEIGHT if k in row), None)
            activation = next((row[k] for k in _ACTIVATION if k in row), None)
            unit = next((u for u in _UNIT if u in row), None)
            if key == ("", "", "") or weight is None or unit is None:
                raise HawqError(
                    f"Line {line} of {source} needs a layer or shape, weight_bits and ms; it has "
                    f"{', '.join(row) or 'nothing'}."
                )
            try:
                bits = (int(weight), None if activation is None else int(activation))
                ms = float(row[unit]) * _UNIT[unit]
            except ValueError as error:
                raise HawqError(f"Line {line} of {source}: {error}.") from error
            if not (0 <= ms < math.inf):
                raise HawqError(f"Line {line} of {source}: {row[unit]} {unit} is no latency.")
            if self._rows.setdefault(key, {}).setdefault(bits, ms) != ms:
                raise HawqError(
                    f"Line {line} of {source} contradicts an earlier one for {' '.join(k for k in key if k)}."
                )
        if not self._rows:
            raise HawqError(f"There are no rows in {source}.")

    def __repr__(self) -> str:
        return f"LatencyTable({self._rows})"  # tables of the same rows are the same in a fingerprint

    @classmethod
    def load(cls, path: str | Path) -> LatencyTable:
        """Read a CSV file.

        Raises:
            HawqError: no such file, or rows that cannot be understood; the message names the line.
        """
        path = Path(path)
        try:
            with path.open(newline="", encoding="utf-8-sig") as file:
                return cls(map(_as_written, csv.DictReader(file)), f"the latency table {path}")
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise HawqError(f"The latency table {path} cannot be read: {error}.") from error

    def rows_of(self, layer: Layer, shape: tuple[int, ...]) -> dict[tuple[int, int | None], float]:
        """``(weight bits, activation bits or None) -> ms`` of one layer.

        Raises:
            HawqError: the table says nothing about this layer.
        """
        text = "x".join(map(str, shape))
        for key in (
            (layer.name, "", ""),
            (layer.weight, "", ""),
            ("", layer.type, text),
            ("", "", text),
            (text, "", ""),
            ("", layer.type, ""),
        ):
            if key in self._rows:
                return self._rows[key]
        names = [" ".join(k for k in key if k) for key in self._rows]
        raise HawqError(
            f"There is no latency for layer {layer.name!r} ({layer.type}, {text}) in {self.source}."
            + nearest(layer.name, names)
        )

    def ms(self, layer: Layer, shape: tuple[int, ...], weight_bits: int, activation_bits: int) -> float:
        """Milliseconds, or ``inf`` where the device lacks these bits."""
        rows = self.rows_of(layer, shape)
        return rows.get((weight_bits, activation_bits), rows.get((weight_bits, None), math.inf))


def _as_written(row: Mapping[str, Any]) -> dict[str, Any]:
    return {k: cell_text(v) if isinstance(v, str) else v for k, v in row.items()}


def _shape(text: str) -> str:
    return text.strip().strip("()[]").replace(" ", "").replace(",", "x").replace("×", "x")
