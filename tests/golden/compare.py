"""Compare two records: ``python -m tests.golden.compare OLD NEW [--exact | --rtol 1e-5]``; exits 1 if any differs."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tests.golden.facts import Record, values_of
from tests.golden.record import machine, read

RTOL = 1e-5
# what training has moved carries the rounding of every step before, and codes may tip over the edge between two
TRAINED = {"training", "weights", "packed", "metrics", "tested", "onnx", "trained", "improved"}
TRAINED_FACTOR = 1000
MOST = 0.02
TIPPED = 0.05  # share of codes, and of weights that follow from them, that another processor may round elsewhere
OUTPUTS = ("logits", "features", "losses", "loss")  # they feel all codes that tipped over
OUTPUTS_MOVE = 0.2
ABSOLUTE = {"loss_check.measured": 1e-6}  # small differences of float32 losses
# what follows from the layout of the packed file, which version 4 changed
LAYOUT = "cost[file_overhead]"
# run -> how much more than rtol other instructions move it: near-equal singular values turn the probes, and bf16 rounds
LOOSE = {"resnet20": 1000, "traces_bf16": 100, "detection": 10}
# bits depend on these
SAME = ("cpu", "instructions", "python", "threads", "torch", "numpy")


def same_machine(first: Mapping[str, Any], second: Mapping[str, Any] | None = None) -> bool:
    """Whether two records have to be equal to the bit."""
    second = machine() if second is None else second
    return all(first.get(key) == second.get(key) for key in SAME)


def differences(old: Record, new: Record, rtol: float | None, run: str = "") -> Iterator[tuple[str, str]]:
    """Names of a run that differ, with what they were and are; ``rtol=None``: to the bit."""
    rtol = None if rtol is None else rtol * LOOSE.get(run, 1)
    largest = {} if rtol is None else _largest(old)
    for name in sorted(old.keys() | new.keys()):
        if name.endswith(LAYOUT):
            continue
        if name not in new:
            yield name, f"{shown(old[name])} -> missing"
        elif name not in old:
            yield name, f"missing -> {shown(new[name])}"
        elif not (_equal(old[name], new[name]) or (rtol and _close(name, old[name], new[name], rtol, largest))):
            yield name, f"{shown(old[name])} -> {shown(new[name])}"


def shown(entry: Any) -> str:
    """A short text."""
    if not isinstance(entry, Mapping):
        return repr(entry)
    first = np.array2string(values_of(entry)[:4], precision=7, separator=", ")
    rest = f"norm {entry['norm']!r}, {entry['sha256'][:8]}" if "sha256" in entry else ""
    return f"{entry['dtype'].lstrip('<|')}{entry['shape']} {first} {rest}".rstrip()


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, float) and isinstance(b, float) and math.isnan(a) and math.isnan(b):
        return True
    if isinstance(a, Mapping) and isinstance(b, Mapping) and "sha256" in a:
        return all(a[key] == b.get(key) for key in ("dtype", "shape", "sha256"))
    return type(a) is type(b) and a == b


def _close(name: str, a: Any, b: Any, rtol: float, largest: Mapping[str, float]) -> bool:
    section, kind = name.split(".")[0], name.split("[")[0]
    trained = section in TRAINED
    if kind.endswith("sha256"):  # of values that are compared one by one
        return True
    tolerance = min(MOST, rtol * (TRAINED_FACTOR if trained else 1))
    if trained and kind.endswith(OUTPUTS):
        tolerance = OUTPUTS_MOVE
    if not isinstance(a, Mapping) or not isinstance(b, Mapping):
        if not all(isinstance(v, float) for v in (a, b)):
            return False
        return a == b or abs(a - b) <= max(
            tolerance * max(abs(a), abs(b), largest.get(kind, 0.0)), ABSOLUTE.get(kind, 0.0)
        )
    if (a["dtype"], a["shape"]) != (b["dtype"], b["shape"]):
        return False
    x, y = values_of(a), values_of(b)
    whole = np.issubdtype(x.dtype, np.integer) or x.dtype == bool
    floor = max(a.get("largest", 0.0), float(np.abs(x[np.isfinite(x)]).max(initial=0.0)))
    if "sha256" not in a:
        floor = max(floor, largest.get(kind, 0.0) if not whole else 0.0)
    moved = x != y if whole else ~np.isclose(x, y, rtol=tolerance, atol=tolerance * floor, equal_nan=True)
    if moved.sum() > (math.ceil(TIPPED * x.size) if trained else 0):
        return False
    if "sha256" in a and (not whole or trained):
        slack = (tolerance + (TIPPED if trained else 0)) * max(a["norm"], b["norm"])
        return abs(a["norm"] - b["norm"]) <= slack
    return "sha256" not in a or a["sha256"] == b["sha256"]


def _largest(record: Record) -> dict[str, float]:
    """Field -> the largest magnitude among its members: what is 0 but for rounding is compared against it."""
    found: dict[str, float] = {}
    for name, entry in record.items():
        kind = name.split("[")[0]
        if "quantizer" in kind:  # bits beside steps
            continue
        values = values_of(entry) if isinstance(entry, Mapping) else [entry] if isinstance(entry, float) else []
        finite = [abs(float(v)) for v in values if math.isfinite(v)]
        found[kind] = max([found.get(kind, 0.0), *finite])
    return found


def main(arguments: list[str] | None = None) -> int:
    """See the module."""
    parser = argparse.ArgumentParser(prog="python -m tests.golden.compare", description=__doc__)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--exact", action="store_true", help="to the bit; the default where both come from one machine")
    how.add_argument("--rtol", type=float, help=f"relative tolerance, such as {RTOL}")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these runs")
    asked = parser.parse_args(arguments)
    old, new = read(asked.old), read(asked.new)
    rtol = asked.rtol
    if rtol is None and not asked.exact and not same_machine(old["machine"], new["machine"]):
        rtol = RTOL
    names = asked.only or sorted(old["runs"].keys() | new["runs"].keys())
    count = total = 0
    for run in names:
        if run not in old["runs"] or run not in new["runs"]:
            print(f"{run}: only in {asked.old if run in old['runs'] else asked.new}")
            count += 1
            continue
        total += len(old["runs"][run])
        for name, text in differences(old["runs"][run], new["runs"][run], rtol, run):
            print(f"{run}: {name}: {text}")
            count += 1
    print(
        f"{count} of {total} values differ, {'to the bit' if rtol is None else f'by more than {rtol:g}'}: "
        f"{old['commit']} ({old['machine']['torch']}) -> {new['commit']} ({new['machine']['torch']})"
    )
    return 1 if count else 0


if __name__ == "__main__":
    sys.exit(main())
