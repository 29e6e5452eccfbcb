"""Latency from a table that somebody measured: layer or shape, bits -> milliseconds."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from hawq_lightning._csv import cell_text
from hawq_lightning._errors import HawqError, nearest
from hawq_lightning._fields import shown
from hawq_lightning._site_table import Layer
from hawq_lightning.selection._checks import whole_number

_NAME = ("layer", "site", "name", "shape", "type")
_WEIGHT = ("weight_bits", "w_bits", "bits")
_ACTIVATION = ("activation_bits", "a_bits")
_UNIT = {"ms": 1.0, "us": 1e-3, "s": 1e3, "latency_ms": 1.0}
_MOST_BITS = 32
_MOST_MS = 1e12


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
            if None in row or "None" in row:
                raise HawqError(f"Line {line} of {source} has more cells than the first line has names.")
            if key == ("", "", "") or weight is None or unit is None:
                raise HawqError(
                    f"Line {line} of {source} needs a layer or shape, weight_bits and ms; it has "
                    f"{', '.join(row) or 'nothing'}."
                )
            where = f"Line {line} of {source}"
            bits = (_bits(weight, where), None if activation is None else _bits(activation, where))
            try:
                ms = float(row[unit]) * _UNIT[unit]
            except (TypeError, ValueError, OverflowError) as error:
                raise HawqError(f"{where}: {unit} is {shown(row[unit])}, not a number.") from error
            if not (0 <= ms <= _MOST_MS):
                raise HawqError(f"{where}: {shown(row[unit])} {unit} is no latency.")
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
            raise HawqError(
                f"The latency table {path} cannot be read: {getattr(error, 'strerror', None) or error}."
            ) from error

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


def _bits(value: object, where: str) -> int:
    """A width from 1 to 32 bits: a whole number, or the text of one.

    Raises:
        HawqError: it is none.
    """
    try:
        number = int(value) if isinstance(value, str) else whole_number(value, "bits")
    except ValueError as error:  # a HawqError is one, too
        raise HawqError(f"{where}: bits are {shown(value)}, not a whole number.") from error
    if not 1 <= number <= _MOST_BITS:
        raise HawqError(f"{where}: bits are {shown(value)}; they must be from 1 to {_MOST_BITS}.")
    return number


def _shape(text: str) -> str:
    return text.strip().strip("()[]").replace(" ", "").replace(",", "x").replace("×", "x")
