"""Files that were damaged or edited: refused in one sentence, identical, or told; never other numbers silently."""

import json
import math
import random
import warnings

import pytest

from hawq_lightning import Candidates, HawqError, Plan
from hawq_lightning.cli import read_manifest, read_record, sealed_text
from hawq_lightning.selection import LatencyTable
from hawq_lightning.sensitivity import Sensitivity, SiteTrace, read_intact
from tests.internals import internal

COUNT = 500


def sensitivity() -> Sensitivity:
    records = (
        SiteTrace("0.weight", "weight", 1.5, 0.1, 0.2, 12, 0.125),
        SiteTrace("1.weight", "weight", -2.25, 0.5, math.inf, 8, -0.28125),
        SiteTrace("0.input", "activation", 0.75, 0.0, 0.3, 6, 0.125),
    )
    rows = {"0.weight": [1.0, 2.0], "1.weight": [-2.0, -2.5], "0.input": [0.5, 0.7, 0.8, 1.0]}
    unit = {"0.weight": "batch", "1.weight": "batch", "0.input": "image"}
    return Sensitivity(
        records, rows, {"0.input": [6.0] * 4}, {"0.weight": [2.0, 2.0], "1.weight": [2.0, 2.0]}, unit,
        {"estimator": "ggn", "seconds": 1.25, "images": 4}, ("a note",), "sha256:abc",
    )  # fmt: skip


PLAN = {
    "format": "hawq_lightning.plan", "version": 2, "selector": "pareto", "budget": "8x", "fingerprint": "sha256:abc",
    "sites": [
        {"name": "0.weight", "kind": "weight", "layers": ["0"], "shape": [3, 4], "numel": 12, "bits": 4,
         "code": "affine", "omega": 0.5, "trace": 1.5,
         "options": [{"bits": 2, "code": "midrise", "omega": 2.0, "perturbation": 1.0},
                     {"bits": 4, "code": "affine", "omega": 0.5, "perturbation": 0.25}]},
        {"name": "0.input", "kind": "activation", "layers": ["0"], "shape": [4], "numel": 4, "bits": 8,
         "code": "affine", "scale": 0.25, "zero_point": 3},
    ],
}  # fmt: skip
CANDIDATES = {
    "format": "hawq_lightning.candidates", "version": 1, "quantizer": "uniform", "quantizer_options": {},
    "sites": {
        "0.weight": {"kind": "weight", "numel": 12, "candidates": PLAN["sites"][0]["options"]},
        "0.input": {"kind": "activation", "numel": 4, "candidates": [
            {"bits": 8, "code": "affine", "omega": 0.5, "perturbation": 0.25, "scale": 0.25, "zero_point": 3}]},
    },
}  # fmt: skip
RECORD = {
    "command": ["hawq-lightning"], "name": "x", "seed": 1, "settings": "ab" * 16, "sizes": {"file_bytes": 7},
    "seconds": {"total": 1.5}, "accuracy": {"float": 0.5, "quantized": 0.25},
    "history": [{"epoch": 1, "phase": "fine_tuning", "val_acc": 0.75}],
}  # fmt: skip
MANIFEST = {
    "format": "hawq_lightning.run_folder", "settings": "ab" * 16, "committed": True, "files": ["plan.json"],
    "pages": {"README.md": "cd" * 32}, "before": {"settings": "ef" * 16, "committed": True},
}  # fmt: skip
LATENCIES = "layer,weight_bits,activation_bits,ms\n0,2,8,0.5\n0,4,8,0.75\n1,8,,1.5\n"


def damaged(raw: bytes, draw: random.Random) -> bytes:
    data, at = bytearray(raw), draw.randrange(len(raw))
    how = draw.choice(["flip", "flip", "flip", "byte", "cut", "delete", "insert"])
    if how == "flip":
        data[at] ^= 1 << draw.randrange(8)
    elif how == "byte":
        data[at] = draw.randrange(256)
    elif how == "cut":
        del data[at:]
    elif how == "delete":
        del data[at : at + draw.choice([1, 8])]
    else:
        data[at:at] = draw.choice([b"NaN", b"-", b"9" * 400, b"[" * 200, b"null", b'"', b"e999"])
    return bytes(data)


@pytest.mark.parametrize("kind", [Sensitivity, Plan, Candidates])
def test_damaged_bytes_of_a_file_with_a_checksum_are_refused_identical_or_told(tmp_path, kind):
    path = tmp_path / "file.json"
    made = sensitivity() if kind is Sensitivity else kind.from_dict(PLAN if kind is Plan else CANDIDATES)
    made.save(path)
    whole, raw = kind.load(path).to_dict(), path.read_bytes()
    outcomes = {"refused": 0, "identical": 0, "told": 0}
    for seed in range(COUNT):
        path.write_bytes(damaged(raw, random.Random(seed)))
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            try:
                same = kind.load(path).to_dict() == whole
            except HawqError as error:
                assert str(error), seed
                outcomes["refused"] += 1
                continue
        changed = any("changed after" in str(w.message) for w in told)
        assert same or changed, f"seed {seed} loads as something else, silently"
        outcomes["identical" if same else "told"] += 1
    assert outcomes["refused"] > COUNT / 4 and outcomes["told"], outcomes


def test_a_damaged_latency_table_is_refused_or_makes_sense(tmp_path):
    path = tmp_path / "latency.csv"
    for seed in range(COUNT):
        path.write_bytes(damaged(LATENCIES.encode(), random.Random(seed)))
        try:
            rows = LatencyTable.load(path)._rows
        except HawqError as error:
            assert str(path) in str(error), seed
            continue
        for widths in rows.values():
            for (weight, activation), ms in widths.items():
                assert 1 <= weight <= 32 and (activation is None or 1 <= activation <= 32) and 0 <= ms < 1e13


VALUES = [math.nan, math.inf, -math.inf, 10**400, -1, 0, 1e308, "x", "", None, True, [], {}, [[[]]], {"a": 1}]


def places(value, path=()):
    """Paths of everything within a JSON value."""
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in entries:
        yield (*path, key)
        yield from places(inner, (*path, key))


def edits(whole, remove):
    """Every place of a JSON value without, or with each of the odd values: place, value, copy."""
    for place in places(whole):
        for value in [None] if remove else VALUES:
            data = json.loads(json.dumps(whole))
            parent = data
            for key in place[:-1]:
                parent = parent[key]
            if remove:
                del parent[place[-1]]
            else:
                parent[place[-1]] = value
            yield place, value, data


@pytest.mark.parametrize("remove", [False, True])
def test_every_field_of_a_sensitivity_file_is_checked(tmp_path, remove):
    whole = json.loads(json.dumps(sensitivity().to_dict()))
    path = tmp_path / "sensitivity.json"
    for place, value, data in edits(whole, remove):
        path.write_text(json.dumps(data))  # without a checksum, as a stranger's
        try:
            read = Sensitivity.load(path)
        except HawqError as error:
            assert str(path) in str(error) and len(str(error)) < 600, (place, value)
            continue
        for r in read:
            assert math.isfinite(r.trace) and math.isfinite(r.mean_trace) and r.stderr >= 0 and r.numel >= 1
        assert all(math.isfinite(x) for values in read.rows.values() for x in values)
        assert not read.rows or set(read.rows) == {r.name for r in read}


@pytest.mark.parametrize("remove", [False, True])
def test_every_field_of_a_candidates_file_is_checked(tmp_path, remove):
    path = tmp_path / "candidates.json"
    for place, value, data in edits(CANDIDATES, remove):
        path.write_text(json.dumps(data))  # without a checksum, as of an earlier release
        try:
            read = Candidates.load(path)
        except HawqError as error:
            assert str(path) in str(error) and len(str(error)) < 600, (place, value)
            continue
        assert str(read)
        for name, listed in read.items():
            assert listed and read.numel[name] >= 0 and read.kinds[name] in ("weight", "activation")
            assert not any(math.isnan(c.omega) for c in listed)
            assert all(c.perturbation >= 0 and c.scale != 0 for c in listed)


@pytest.mark.parametrize("remove", [False, True])
@pytest.mark.parametrize(("whole", "read"), [
    (RECORD, read_record), (MANIFEST, lambda path: read_manifest(path, ("README.md",))),
])  # fmt: skip
def test_every_field_that_a_run_goes_on_from_is_checked(tmp_path, whole, read, remove):
    path = tmp_path / "record.json"
    refused = 0
    for place, value, data in edits(whole, remove):
        path.write_text(json.dumps(data))  # of an earlier release
        try:
            got = read(path)
        except HawqError as error:
            assert str(path) in str(error) and len(str(error)) < 600, (place, value)
            refused += 1
            continue
        numbers = [*got.get("seconds", {}).values(), *got.get("accuracy", {}).values()]
        assert all(math.isfinite(x) for x in numbers), (place, value)
        assert all(isinstance(name, str) for name in got.get("files", ()))
        assert set(got.get("pages", ())) <= {"README.md"}
    assert refused >= (1 if remove else 50)


@pytest.mark.parametrize(("whole", "read"), [
    (RECORD, read_record), (MANIFEST, lambda path: read_manifest(path, ("README.md",))),
])  # fmt: skip
def test_a_changed_record_of_a_run_is_refused(tmp_path, whole, read):
    path = tmp_path / "record.json"
    raw = sealed_text(whole).encode()
    path.write_bytes(raw)
    assert {k: v for k, v in read(path).items() if k != "sha256"} == whole
    assert sealed_text(read(path)).encode() == raw
    for seed in range(COUNT):
        path.write_bytes(damaged(raw, random.Random(seed)))
        try:
            got = read(path)
        except HawqError as error:
            assert str(path) in str(error), seed
            continue
        assert {k: v for k, v in got.items() if k in whole} == whole, f"seed {seed} loads as something else"


@pytest.mark.parametrize(
    "place, value, say",
    [
        (("records", 1, "trace"), math.nan, "trace of '1.weight' is nan, not a finite number"),
        (("records", 0, "mean_trace"), 10**400, "mean_trace of '0.weight'.*not a finite number"),
        (("records", 0, "numel"), 2.5, "numel of '0.weight' is 2.5, not a whole number"),
        (("records", 2, "kind"), "wieght", "kind of '0.input' is 'wieght'"),
        (("rows", "0.weight"), [1.0], "rows of '1.weight' are 2, of other sites 1"),
        (("sizes", "0.input"), [6.0], "sizes of '0.input' are 1, its rows 4"),
        (("row_unit", "0.weight"), "row", "row_unit of '0.weight' is 'row'"),
        (("records", 1, "name"), "0.weight", "site '0.weight' is there twice"),
        (("record",), [], "unknown field 'record'. Did you mean 'records'"),
    ],
)
def test_the_field_is_named(place, value, say):
    data = json.loads(json.dumps(sensitivity().to_dict()))
    parent = data
    for key in place[:-1]:
        parent = parent[key]
    parent[place[-1]] = value
    with pytest.raises(HawqError, match=say):
        Sensitivity.from_dict(data)


def test_a_file_of_release_010_without_a_checksum_loads(tmp_path):
    data = sensitivity().to_dict()
    data["records"][0]["stderr"] = math.nan  # which it wrote where one batch was measured
    (tmp_path / "s.json").write_text(json.dumps(data))
    assert Sensitivity.load(tmp_path / "s.json").records[0].stderr == math.inf


def test_an_edited_file_loads_with_a_warning_but_is_not_taken_from_a_cache(tmp_path):
    path = tmp_path / "s.json"
    sensitivity().save(path)
    assert read_intact(path) == Sensitivity.load(path)
    path.write_text(path.read_text().replace('"trace": 1.5', '"trace": 2.5'))
    with pytest.warns(UserWarning, match="was changed after it was written"):
        assert Sensitivity.load(path)["0.weight"].trace == 2.5
    with pytest.warns(UserWarning, match="measured anew"):
        assert read_intact(path) is None
    path.write_text(path.read_text()[:-9])
    with pytest.warns(UserWarning, match="cut short.*measured anew"):
        assert read_intact(path) is None


@pytest.mark.parametrize(
    "text, say",
    [
        ("[" * 500 + "]" * 500, "within each other"),
        ("[" + "[]," * 1_100_000 + "[]]", "objects, lists and fields"),
        ("[" + "1," * 1_100_000 + "1]", "items"),
        ('{"a": "' + "[" * 1000 + '\\"[[[", "b": 1}', "This is not a plan"),  # brackets in strings are text
    ],
)
def test_a_plan_that_would_take_much_memory_is_refused_before_it_is_parsed(tmp_path, text, say):
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(HawqError, match=say):
        Plan.load(tmp_path / "plan.json")


def test_a_plan_of_more_bytes_than_any_plan_has_is_refused(tmp_path):
    with (tmp_path / "plan.json").open("wb") as file:
        file.truncate(internal("_io").PLAN_JSON.size + 1)
    with pytest.raises(HawqError, match="bytes"):
        Plan.load(tmp_path / "plan.json")
