"""Kills short runs at random points, starts them again, and compares: ``python -m tests.stress.kills COUNT SEED``.

One process imports everything and never computes; every run is a fork of it, so that a run costs seconds. Half of the
kills come at a line of Python drawn at random from each stage in turn (the process kills itself there), half at a time
drawn at random (from outside, also within C). One recovery in four is killed once more.
"""

from __future__ import annotations

import io
import json
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

import torch

import hawq_lightning
from tests.stress.short_run import BATCHES, short_run

OWN = str(Path(hawq_lightning.__file__).parent)
TRACED = (OWN, "cloud_io.py", "checkpoint_connector.py", "model_checkpoint.py", "training_epoch_loop.py")
STAGES = {  # innermost function on the stack that says what the process is at
    "save_packed": "writing the packed file", "save_checkpoint": "writing a checkpoint",
    "dump_checkpoint": "writing a checkpoint", "measure": "measuring", "candidates": "calibrating",
    "loss_per_site": "checking losses", "select": "selecting", "with_bootstrap_stability": "selecting",
    "frontier": "selecting",
    "_select": "selecting", "analyze": "between the steps of a choice", "enable": "enabling the quantizers",
    "write_text": "writing results", "save": "writing results", "training_step": "mid-epoch",
    "optimizer_step": "mid-epoch", "advance": "mid-epoch", "validation_step": "validating",
}  # fmt: skip


def stage_of(frame) -> str:
    """What the process is at, by its stack."""
    while frame is not None:
        if (known := STAGES.get(frame.f_code.co_name)) is not None:
            return known
        frame = frame.f_back
    return "between"


class Lines:
    """Counts the lines that run in the traced files; at ``last`` the process kills itself."""

    def __init__(self, last: int = -1, note: Path | None = None) -> None:
        self.last, self.note, self.count = last, note, 0
        self.stages: list[str] = []

    def __call__(self, frame, event, arg):
        return self._line if any(part in frame.f_code.co_filename for part in TRACED) else None

    def _line(self, frame, event, arg):
        if event == "line":
            if self.last < 0:
                self.stages.append(stage_of(frame))
            elif self.count == self.last:
                self.note.write_text(f"{stage_of(frame)}: {Path(frame.f_code.co_filename).name}:{frame.f_lineno}")
                os.kill(os.getpid(), signal.SIGKILL)
            self.count += 1
        return self._line


def forked(folder: Path, lines: Lines | None = None, census: Path | None = None, after: float | None = None) -> int:
    """Run in a child, killed ``after`` seconds if it still runs; its exit status, negative for a signal."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            out = os.open(folder.with_suffix(".out"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(out, 1), os.dup2(out, 2)
            if lines is not None:
                sys.settrace(lines)
            short_run(folder)
            sys.settrace(None)
            if census is not None:
                census.write_text(json.dumps(lines.stages))
            status = 0
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
        os._exit(status)
    began = time.perf_counter()
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.perf_counter() - began > (300 if after is None else after):
            os.kill(child, signal.SIGKILL)
            return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        time.sleep(0.002)


def measured(folder: Path) -> int:
    """Batches measured so far, over all starts."""
    log = folder / "batches.log"
    return log.stat().st_size if log.is_file() else 0


def kept(folder: Path, total: int) -> int:
    """Measured batches that a run which starts now need not measure."""
    if (folder / "sensitivity.json").is_file():
        return total
    partial = folder / "sensitivity.partial"
    if not partial.is_file():
        return 0
    state = torch.load(io.BytesIO(partial.read_bytes()[32:]), weights_only=True)  # a checksum comes first
    return state["step"] * BATCHES + state["done"]


def campaign(count: int, seed: int, folder: Path) -> dict:
    """Kill ``count`` times; what came of it."""
    draw = random.Random(seed)
    began = time.perf_counter()
    whole = folder / "undisturbed"
    assert forked(whole) == 0, whole.with_suffix(".out").read_text()[-3000:]
    duration = time.perf_counter() - began
    expected, total = json.loads((whole / "found.json").read_text()), measured(whole)
    census = folder / "census.json"
    assert forked(folder / "census", Lines(), census) == 0, (folder / "census.out").read_text()[-3000:]
    lines: dict[str, list[int]] = {}
    for number, stage in enumerate(json.loads(census.read_text())):
        lines.setdefault(stage, []).append(number)
    turns = sorted(lines)
    assert not (lost := set(STAGES.values()) - set(turns)), f"no function of a run says that it is at {lost}"
    kills, by_stage, failures, again = 0, Counter(), [], 0
    while kills < count:
        run = folder / f"run{kills}"
        note = run.with_suffix(".note")
        if draw.random() < 0.5:
            stage = turns[kills % len(turns)]
            status = forked(run, Lines(draw.choice(lines[stage]), note))
            where = note.read_text() if note.is_file() else "not reached"
        else:
            after = draw.uniform(0, duration)
            status, where = forked(run, after=after), f"clock: {after:.3f} s of {duration:.3f} s"
        if status != -signal.SIGKILL:  # it was faster than the clock
            continue
        kills += 1
        by_stage[where.split(":")[0]] += 1
        problem = ""
        known, sofar = kept(run, total), measured(run)
        if draw.random() < 0.25 and kills < count:
            after = draw.uniform(0, duration / 2)
            if forked(run, after=after) == -signal.SIGKILL:
                kills, again = kills + 1, again + 1
                by_stage["clock, in the recovery"] += 1
                where += f", then clock: {after:.3f} s"
                # batches finished at the first kill stay finished
                problem = "" if kept(run, total) >= known else "a measured batch was lost in the second kill"
                known, sofar = kept(run, total), measured(run)
        status = forked(run)
        if status != 0:
            problem = f"does not recover (status {status}): " + run.with_suffix(".out").read_text()[-1500:]
        else:
            found = json.loads((run / "found.json").read_text())
            differ = [key for key in expected if found[key] != expected[key]]
            problem = problem or (f"other {', '.join(differ)}" if differ else "")
            repeated = measured(run) - sofar - (total - known)
            if repeated > 0 or (known == total and measured(run) != sofar):
                problem = problem or f"{repeated} finished batches were measured again"
        if problem:
            failures.append({"kill": kills, "at": where, "problem": problem})
            print(json.dumps(failures[-1]), file=sys.stderr, flush=True)
    return {
        "bits": {s["name"]: s["bits"] for s in expected["plan"]["sites"]}, "kills": kills,
        "seed": seed, "recoveries killed once more": again, "batches measured": total,
        "kills by stage": dict(sorted(by_stage.items())), "failures": failures,
        "seconds": round(time.perf_counter() - began, 1),
    }  # fmt: skip


if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="hawq_lightning-kills-") as place:
        result = campaign(int(sys.argv[1]), int(sys.argv[2]), Path(place))
    print(json.dumps(result, indent=1))
    sys.exit(bool(result["failures"]))
