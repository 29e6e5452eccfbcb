"""CSV whose texts no spreadsheet takes for formulas."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable

_FORMULA = ("=", "+", "-", "@")


def csv_text(columns: Iterable[object], rows: Iterable[Iterable[object]], lineterminator: str = "\n") -> str:
    """A table as CSV; cells that would be formulas get an apostrophe in front."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator=lineterminator)
    writer.writerow([_harmless(cell) for cell in columns])
    writer.writerows([_harmless(cell) for cell in row] for row in rows)
    return buffer.getvalue()


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
    return cell.lstrip("' \t\r\n").startswith(_FORMULA)
