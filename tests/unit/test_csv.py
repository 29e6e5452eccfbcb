"""CSV of any names: a reader gets back what was written, and a spreadsheet takes no cell for a formula."""

from __future__ import annotations

import csv
import io
import random

import pytest

from hawq_lightning.report import csv_text
from tests.internals import internal

FORMULAS = "=+-@＝＋－＠"
PIECES = [
    *FORMULAS, "'", '"', ",", ";", "\t", "\n", "\r", "\r\n", " ", "\u00a0", "\u3000", "\x0b", "\ufeff", "\x00", "a",
    "net.0.weight", "1", "-1", "1e5", "nan", "é", "重み", "🙂", "e\u0301", "\\", "|", "cmd|' /C calc'!A0",
    "SUM(A1:A9)", 'HYPERLINK("http://x")', "x" * 40_000,
]  # fmt: skip


def names(count, seed):
    draw = random.Random(seed)
    for _ in range(count):
        yield "".join(draw.choice(PIECES[:-1]) for _ in range(draw.choice([0, 1, 1, 2, 3, 6])))
    yield from PIECES
    for sign in FORMULAS:
        yield from (f"{before}{sign}{after}" for before in ("", " ", "\t", "'", "''", "\r\n", "\u00a0", '"')
                    for after in ("", "1+1", "net.weight", "SUM(A1)", "1"))  # fmt: skip


def is_number(cell):
    try:
        float(cell)
    except ValueError:
        return False
    return True


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_any_names_come_back_and_none_is_a_formula(end):
    every = list(names(3000, 5))
    rows = [every[i : i + 3] for i in range(0, len(every) - 2, 3)]
    text = csv_text(["=a", "b", "@c"], rows, lineterminator=end)
    read = list(csv.reader(io.StringIO(text, newline="")))
    assert len(read) == len(rows) + 1
    cell_text = internal("_csv").cell_text
    for wanted, cells in zip([["=a", "b", "@c"], *rows], read, strict=True):
        assert [cell_text(cell) for cell in cells] == wanted
        for cell in cells:
            assert not cell.lstrip().startswith(tuple(FORMULAS)) or is_number(cell), repr(cell)


def test_numbers_stay_numbers():
    row = [-1.5, "-1.5", "+3e4", 0, None, True]
    assert csv_text(["a"] * 6, [row]).splitlines()[1] == "-1.5,-1.5,+3e4,0,,True"
