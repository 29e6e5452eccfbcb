"""No number moves: short runs through all of the package against a record made before (see README.md here)."""

from __future__ import annotations

from functools import cache

import pytest

from tests.golden.compare import RTOL, differences, same_machine
from tests.golden.facts import Record
from tests.golden.record import STORED, read
from tests.golden.runs import RUNS, SHARED, record_of

KNOWN = read(STORED)
SHOWN = 12


@cache
def made(run: str) -> Record:
    """A run's record; made once for all its tests."""
    if RUNS[run].shared and SHARED is None:
        pytest.skip("needs the folder shared/data beside the checkout")
    return record_of(run)


def section(name: str) -> str:
    return name.split(".")[0]


def slow(run: str) -> list[pytest.MarkDecorator]:
    """Runs that ``make test`` leaves to ``make stress``."""
    return [] if RUNS[run].fast else [pytest.mark.stress]


CASES = [
    pytest.param(run, part, id=f"{run}-{part}", marks=slow(run))
    for run, record in KNOWN["runs"].items()
    if run in RUNS
    for part in sorted({section(name) for name in record})
]


@pytest.mark.parametrize(("run", "part"), CASES)
def test_no_number_moved(run: str, part: str) -> None:
    old, new = ({k: v for k, v in r.items() if section(k) == part} for r in (KNOWN["runs"][run], made(run)))
    rtol = None if same_machine(KNOWN["machine"]) else RTOL
    found = [f"{name}: {text}" for name, text in differences(old, new, rtol, run)]
    how = "to the bit" if rtol is None else f"by more than {rtol:g}"
    more = f"\n... and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
    assert not found, f"{len(found)} of {len(old)} values of {run} moved {how}:\n" + "\n".join(found[:SHOWN]) + more


@pytest.mark.parametrize(
    "run", [pytest.param(n, marks=[] if r.fast else [pytest.mark.stress]) for n, r in RUNS.items()]
)
def test_the_record_has_the_run_and_nothing_new(run: str) -> None:
    assert run in KNOWN["runs"], "not recorded yet: python -m tests.golden.record, see README.md"
    parts = ({section(name) for name in r} for r in (KNOWN["runs"][run], made(run)))
    old, new = parts
    assert new == old


def test_every_recorded_run_is_still_made() -> None:
    assert KNOWN["runs"].keys() == RUNS.keys()
