"""The table of features is that of the tests."""

from .features import PAGE, page, rows


def test_the_table_is_up_to_date():
    assert PAGE.read_text(encoding="utf-8") == page(), "run: python -m tests.features"


def test_rows_are_not_lost():
    assert len(rows()) > 50
