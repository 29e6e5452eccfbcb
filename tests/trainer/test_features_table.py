"""The table of features is that of the tests."""

from tests.features import GROUPS, PAGE, page, rows


def test_the_table_is_up_to_date():
    assert PAGE.read_text(encoding="utf-8") == page(), "run: python -m tests.features"


def test_every_group_is_proven():
    assert {key[0] for key in rows()} == set(GROUPS)
    assert len(rows()) > 50
