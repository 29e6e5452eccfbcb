"""Every console script on a run folder in every state: ``python -m tests.stress.run_folders [PART OF A NAME ...]``.

Four rules hold for all of them:

1. what the run did not make is there afterwards, with the same content;
2. results of an earlier run are there afterwards, unless the command succeeded and was told to replace them, or went on
   with its own run;
3. exit code 0 and results, or exit code 1 and one line that names a folder, file, or setting; where the code is known
   it is that one;
4. no temporary file is left, nothing set aside, no lock that binds.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

from filelock import FileLock, Timeout

from hawq_lightning import cli, report  # noqa: F401  what the programs import, once for all of them
from tests import console
from tests.app.test_run_folder import FAST
from tests.stress.folder_states import ASIDE, FOLDER, LOCK, MANIFEST, PLANTED, STATES, SWEEP, State, mine

SCRIPTS = {"train": "hawq-lightning", "analyze": "hawq-lightning-analyze", "export": "hawq-lightning-export",
           "collect": "hawq-lightning-collect", "inside": "hawq-lightning-collect"}  # fmt: skip
PLACE = f"{SWEEP}/{FOLDER}"
# what a script may write over where an earlier command wrote it, beside a run's own results
ITS_OWN = {
    "train": (MANIFEST,), "analyze": (MANIFEST,),
    "export": (MANIFEST, "report.html", "README.md", "figures/", "model.onnx", "export.json", "latency.csv"),
    "collect": (), "inside": (MANIFEST,),
}  # fmt: skip
SHOWN = {"train": "metrics.json", "analyze": "metrics.json", "export": "export.json", "inside": "sweep.html"}
_TEMPORARY = re.compile(r"\.(?P<name>.+)\.[a-z0-9_]{8}")


def command(script: str, state: State) -> list[str]:
    """Its arguments; it is started above the sweep's folder."""
    if script in ("collect", "inside"):
        return [SWEEP if script == "collect" else PLACE]
    if script == "export":
        return [f"run_folder={PLACE}", "images=4", "formats=[]", "speed=false", "table=false"]
    return [*FAST, f"hydra.run.dir={PLACE}", "report=false", *state.more]


def contents(home: Path) -> dict[str, tuple[str, bool]]:
    """Every file below a folder, through links too: its hash, and whether it is somebody else's."""
    found = {}
    for base, _, names in os.walk(home, followlinks=True):
        for name in names:
            path = Path(base, name)
            if path.name != LOCK and path.is_file() and not path.is_symlink():  # the file is elsewhere, and stays
                raw = path.read_bytes()
                digest = hashlib.sha256(raw).hexdigest()
                found[path.relative_to(home).as_posix()] = (digest, raw.startswith(b"mine"))
    return found


def made_by_a_killed_run(name: str, before: dict[str, tuple[str, bool]]) -> bool:
    """A file of a run that had replaced nothing when it was killed: it goes, and what was set aside comes back."""
    there = any(f"{ASIDE}/" in other for other in before)
    return there and not name.startswith(f"{PLACE}/{ASIDE}/")


def losses(state: State, script: str, code: int, before: dict, after: dict) -> Iterator[str]:
    """What broke the first two rules."""
    for name, (digest, somebodys) in before.items():
        there = {after[n][0] for n in (name, name.replace(f"{ASIDE}/", "")) if n in after}  # it may come back
        if digest in there:
            continue
        now = "changed" if there else "gone"
        inside = name.removeprefix(f"{PLACE}/").removeprefix("behind/")
        if inside.endswith(".log") and now != "gone":  # it grows
            continue
        if somebodys:
            yield f"somebody's {name} is {now}"
        elif code != 0:
            if not made_by_a_killed_run(name, before):
                yield f"it failed, and {name} is {now}"
        elif not inside.startswith(ITS_OWN[script]) and not (script in ("train", "analyze") and state.replaces):
            yield f"{name} is {now}"


def left_behind(home: Path, before: dict, ran: bool) -> Iterator[str]:
    """What broke the fourth rule."""
    for path in home.rglob("*"):
        name = path.relative_to(home).as_posix()
        if name not in before and path.name not in (MANIFEST, LOCK) and _TEMPORARY.fullmatch(path.name):
            yield f"left behind: {name}"
        if path.name == ASIDE and (ran or not any(f"{ASIDE}/" in other for other in before)):
            yield f"still set aside: {', '.join(p.name for p in path.rglob('*') if p.is_file())}"
        if path.name == LOCK:
            try:
                with FileLock(path, timeout=0):
                    pass
            except Timeout:
                yield f"{name} binds"


def values(state: State) -> list[str]:
    """Those of its settings that a sentence would not hold by chance."""
    given = [setting.partition("=")[2] for setting in state.more]
    return [value for value in given if len(value) > 2 and value not in ("true", "false")]


def said(state: State, script: str, done: console.Finished, home: Path) -> Iterator[str]:
    """What broke the third rule."""
    code, out, err = done
    if (expected := state.codes.get(script)) not in (None, code):
        yield f"exit code {code}, not {expected}"
    if code == 0:
        where = home / SWEEP / "sweep.html" if script == "collect" else home / PLACE / SHOWN[script]
        if not where.is_file() or not out.strip():
            yield "exit code 0 without results"
        if "Traceback" in err:
            yield "a traceback"
        return
    lines = err.strip().splitlines()
    if code != 1 or len(lines) != 1 or not lines[0].startswith("error: "):
        yield f"exit code {code} with {len(lines)} lines"
    elif not any(part in lines[0] for part in (FOLDER, SWEEP, *values(state))):
        yield "names no folder, file, or setting"


def tried(script: str, state: State, runs: dict[str, Path], home: Path) -> tuple[list[int], list[str]]:
    """Make the folder, start the script there; its exit codes and what was wrong."""
    (home / SWEEP).mkdir(parents=True)
    own = "analyze" if script == "analyze" else "train"
    other = "train" if own == "analyze" else "analyze"
    folder = home / PLACE
    state.make(folder, runs[other if state.others else own])
    mine("notes.txt", "other/mine.json")(home / SWEEP)
    if folder.is_dir():
        mine(*(n for n in PLANTED if not any((folder / p).is_file() for p in Path(n).parents)))(folder)
    before = contents(home)
    with ExitStack() as stack:
        if state.locked:
            stack.enter_context(FileLock(folder / LOCK))
        started = [
            console.begin(SCRIPTS[script], *command(script, state), cwd=home, before=state.before)
            for _ in range(2 if state.twice else 1)
        ]
        ended = [program.end(120) for program in started]
    codes = [done.returncode for done in ended]
    ran = 0 in codes and script in ("train", "analyze")
    wrong = [*losses(state, script, min(codes), before, contents(home)), *left_behind(home, before, ran)]
    for done in ended:
        if problems := list(said(state, script, done, home)):
            wrong += [*problems, f"it said: {done.stderr.strip()[-900:] or done.stdout.strip()[-300:]}"]
    if state.twice and state.replaces and script in ("train", "analyze") and not ran:
        wrong.append("of two at once none has come to its end")
    return codes, wrong


def campaign(parts: Sequence[str], base: Path) -> dict:
    """Try every script on every state whose name holds one of the parts."""
    began = time.perf_counter()
    runs = {}
    for script in ("train", "analyze"):
        runs[script] = base / script
        done = console.shell(SCRIPTS[script], *FAST, f"hydra.run.dir={script}", cwd=base)
        assert done.returncode == 0, done.stderr[-3000:]
    states = {name: state for name, state in STATES.items() if not parts or any(part in name for part in parts)}
    outcomes: Counter[str] = Counter()
    failures = []
    for number, (name, state) in enumerate(states.items()):
        for script in SCRIPTS:
            home = base / f"home{number}{script}"
            codes, wrong = tried(script, state, runs, home)
            outcomes.update(f"{script}: exit code {code}" for code in codes)
            if wrong:
                failures.append({"state": name, "script": script, "wrong": wrong})
                print(json.dumps(failures[-1]), file=sys.stderr, flush=True)
            shutil.rmtree(home)
    return {
        "states": len(states), "pairs": len(states) * len(SCRIPTS),
        "outcomes": dict(sorted(outcomes.items())), "failures": failures,
        "seconds": round(time.perf_counter() - began, 1),
    }  # fmt: skip


def main() -> None:
    """Print what came of it as JSON; exit code 1 where something was wrong."""
    with tempfile.TemporaryDirectory(prefix="hawq_lightning-folders-") as place:
        os.environ |= {"HAWQ_LIGHTNING_CACHE": f"{place}/cache"}
        with console.serving():
            result = campaign(sys.argv[1:], Path(place))
    print(json.dumps(result, indent=1))
    sys.exit(bool(result["failures"]))


if __name__ == "__main__":
    from tests.stress import run_folders  # under this name other processes find its functions

    run_folders.main()
