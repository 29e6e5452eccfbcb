"""Ten kills and 500 damaged files in every test run; 200 and 10,000 under ``make stress``: see RESULTS.md."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from hawq_lightning import HawqError
from tests.console import python
from tests.stress import zoo_traces
from tests.stress.zoo import PARTLY, REFUSED, ZOO, one
from tests.stress.zoo_small import SMALL
from tests.trainers import assert_mixed_elsewhere

ROOT = Path(__file__).parent.parent.parent


def checked(done):
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
@pytest.mark.parametrize("count", [4, pytest.param(200, marks=pytest.mark.stress)])
def test_killed_at_random_points_it_recovers_to_the_undisturbed_plan(count):
    program = "import runpy; runpy.run_module('tests.stress.kills', run_name='__main__')"
    found = checked(python(program, count, 1, cwd=ROOT, timeout=3600))
    assert found["kills"] >= count and len(found["kills by stage"]) >= 4 and found["batches measured"] > 8


@pytest.mark.feature(
    "Files from strangers",
    "damaged files of every kind: packed, plans, traces, caches, candidates, latency tables, records of a run",
    "refused, identical, measured anew, or (what still makes sense) loaded with a warning that it was changed; nothing "
    "is run",
)
@pytest.mark.parametrize("count", [100, pytest.param(10_000, marks=pytest.mark.stress)])
def test_damaged_files_are_refused_or_identical(count):
    # a new Python, so that every import of what was loaded is seen
    command = [sys.executable, "-m", "tests.stress.mutations", str(count), "1"]
    found = checked(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=3600))
    assert sum(found["outcomes"].values()) == count
    of_each_kind = count // 26
    for kind, how in (("packed, bytes", "refused"), ("plan, values", "refused"), ("candidates, values", "refused"),
                      ("record, bytes", "refused"), ("manifest, values", "refused"),
                      ("cache, bytes", "anew")):  # fmt: skip
        assert found["outcomes"][f"{kind}: {how}"] > of_each_kind // 3
    assert not any("FAILED" in outcome for outcome in found["outcomes"])


@pytest.mark.stress
@pytest.mark.parametrize("name", ZOO)
def test_a_member_of_the_zoo_goes_through(name):
    for package in ("timm", "transformers", "segmentation_models_pytorch", "torch_geometric"):
        pytest.importorskip(package)
    if name in REFUSED:
        with pytest.raises(HawqError, match=REFUSED[name]):
            one(ZOO[name])
        return
    found = one(ZOO[name])
    assert found["packed"] and found["moved"] and len(found["widths"]) >= 2
    assert found["matrices"] >= 0.95 or name in PARTLY
    assert isinstance(found["onnx"], str) or found["onnx"] < 0.1  # one code that rounds the other way


@pytest.mark.stress
def test_every_command_on_a_run_folder_in_every_state_loses_nothing():
    command = [sys.executable, "-m", "tests.stress.run_folders"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=3600)
    assert done.stdout.lstrip().startswith("{"), done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert found["failures"] == [] and done.returncode == 0
    assert found["states"] >= 30 and found["pairs"] == 5 * found["states"]


QUICK = "two towers, temperature"


@pytest.mark.parametrize("name", [QUICK, *(pytest.param(n, marks=pytest.mark.stress) for n in SMALL if n != QUICK)])
def test_traces_of_a_small_member_of_the_zoo_are_those_of_its_dense_matrices(name):
    found = zoo_traces.one(name)
    assert found["gauss_newton"] < 1e-6, "Llama and T5 normalise in float32"
    assert isinstance(found["hessian"], str) or found["hessian"] < 4
