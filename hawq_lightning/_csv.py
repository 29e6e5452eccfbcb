"""CSV whose texts no spreadsheet takes for formulas."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable

# what spreadsheets skip first, and the signs; the wide ones begin a formula where East Asian text is typed
_FORMULA = re.compile(r"['\s\ufeff\x00]*[=+\-@\uff1d\uff0b\uff0d\uff20]")


def csv_text(columns: Iterable[object], rows: Iterable[Iterable[object]], lineterminator: str = "\n") -> str:
    """A table as CSV; cells that would be formulas get an apostrophe in front."""
    return "".join(_line(row) + lineterminator for row in (columns, *rows))


def _line(row: Iterable[object]) -> str:
    # cells with a lone carriage return are put in quotes only where it is part of the line's end
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\r\n").writerow([_harmless(cell) for cell in row])
    return buffer.getvalue()[:-2]


def cell_text(cell: str) -> str:
    """What a cell said before :func:`csv_text` put an apostrophe in front."""
    return cell[1:] if cell.startswith("'") and _is_formula(cell[1:]) else cell


def _harmless(cell: object) -> object:
    if not isinstance(cell, str) or not _is_formula(cell):
        return cell
    try:
        float(cell)
    except ValueError:
        return f"'{cell}"
    return cell


def _is_formula(cell: str) -> bool:
    # with apostrophes of its own in front as well, so that reading gives back exactly what was written
    return _FORMULA.match(cell) is not None
