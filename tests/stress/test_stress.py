"""Ten kills and 500 damaged files in every test run; 200 and 10,000 under ``make stress``: see RESULTS.md."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.trainers import assert_mixed_elsewhere

ROOT = Path(__file__).parent.parent.parent


def campaign(what, count, seed, timeout):
    """In a process of its own, which may fork because it has not computed anything."""
    done = subprocess.run(
        [sys.executable, "-m", f"tests.stress.{what}", str(count), str(seed)],
        cwd=ROOT, capture_output=True, text=True, timeout=timeout, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.stdout.lstrip().startswith("{"), done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert found["failures"] == [] and done.returncode == 0
    assert_mixed_elsewhere(found.pop("bits"))
    return found


@pytest.mark.feature(
    "Restart",
    "SIGKILL at random points: measuring, calibrating, selecting, arming, mid-epoch, validating, writing a checkpoint, "
    "results or the packed file",
    "started again it ends with the same plan, weights and packed file to the bit; no finished batch is measured again",
)
@pytest.mark.parametrize("count", [10, pytest.param(200, marks=pytest.mark.stress)])
def test_killed_at_random_points_it_recovers_to_the_undisturbed_plan(count):
    found = campaign("kills", count, 1, 3600)
    assert found["kills"] >= count and len(found["kills by stage"]) >= 4 and found["batches measured"] > 8


@pytest.mark.feature(
    "Files from strangers",
    "damaged files of every kind: packed, plans, traces, caches, candidates, latency tables, records of a run",
    "refused, identical, measured anew, or (what still makes sense) loaded with a warning that it was changed; nothing "
    "is run",
)
@pytest.mark.parametrize("count", [500, pytest.param(10_000, marks=pytest.mark.stress)])
def test_damaged_files_are_refused_or_identical(count):
    found = campaign("mutations", count, 1, 3600)
    assert sum(found["outcomes"].values()) == count
    of_each_kind = count // 26
    for kind, how in (("packed, bytes", "refused"), ("plan, values", "refused"), ("candidates, values", "refused"),
                      ("record, bytes", "refused"), ("manifest, values", "refused"),
                      ("cache, bytes", "anew")):  # fmt: skip
        assert found["outcomes"][f"{kind}: {how}"] > of_each_kind // 3
    assert not any("FAILED" in outcome for outcome in found["outcomes"])
