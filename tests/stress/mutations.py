"""Damages files of every kind and reads them: ``python -m tests.stress.mutations COUNT SEED``.

Reading must end in HawqError, in the identical value, or (what still makes sense) in a warning that it was changed; a
measurement is made anew, with a warning where its file was taken for whole. Anything else is a failure: another
exception, a signal, more than 10 s, 1 GiB more memory, or an audit event of code being run, imported or written.
``resealed`` files carry a checksum that is right, as a stranger's would, and ``unsealed`` ones have lost theirs, as
those of earlier releases: they may load as what they say, and must do no harm. Latency tables have no checksum.
"""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from contextlib import suppress
from pathlib import Path

import torch

from hawq_lightning import HawqError
from tests.stress.damage import (
    digest_resealed,
    header_damage,
    json_damage,
    json_resealed,
    raw_damage,
    resealed,
    table_damage,
)
from tests.stress.readers import READERS, make

SECONDS, MEMORY = 10, 1 << 30
FORBIDDEN = ("exec", "compile", "import", "os.system", "os.exec", "os.posix_spawn", "subprocess.", "pickle.",
             "os.remove", "os.rename", "os.rmdir", "shutil.", "socket.", "ctypes.")  # fmt: skip


class Watch:
    """Notes forbidden audit events while it is on."""

    def __init__(self) -> None:
        self.on, self.allowed, self.seen = False, (), []
        sys.addaudithook(self._hook)

    def _hook(self, event, args):
        forbidden = event.startswith(FORBIDDEN) or (event == "open" and _writes(args))
        if self.on and forbidden and not event.startswith(self.allowed):
            self.seen.append(f"{event} {str(args)[:200]}")


def _writes(args) -> bool:
    mode, flags = args[1], args[2]
    return any(c in (mode or "") for c in "wax+") or bool((flags or 0) & (os.O_WRONLY | os.O_RDWR))


KINDS = {
    "packed, bytes": ("model.safetensors", raw_damage), "packed, header": ("model.safetensors", header_damage),
    "packed, resealed": ("model.safetensors", resealed),
    "packed version 3, bytes": ("version_3.safetensors", raw_damage),
    "packed version 3, header": ("version_3.safetensors", header_damage),
    "partial, bytes": ("sensitivity.partial", raw_damage),
    "partial, resealed": ("sensitivity.partial", digest_resealed),
    "latencies, bytes": ("latency.csv", raw_damage), "latencies, cells": ("latency.csv", table_damage),
    **{
        f"{what}, {how}": (name, damage)
        for what, name in (
            ("plan", "plan.json"), ("traces", "sensitivity.json"), ("cache", "cache.json"),
            ("candidates", "candidates.json"), ("record", "metrics.json"), ("manifest", ".hawq_lightning.json"),
        )
        for how, damage in (("bytes", raw_damage), ("values", json_damage), ("resealed", json_resealed))
        if (what, how) != ("cache", "resealed")  # it is the traces that were asked for
    },
}  # fmt: skip
_TOLD = ("was changed after", "were changed after")
_ANEW = "measured anew"


class Loads:
    """Reads one damaged file and judges what came of it."""

    def __init__(self, folder: Path, files: dict[str, bytes]) -> None:
        self.folder, self.watch = folder / "damaged", Watch()
        self.folder.mkdir(exist_ok=True)
        self.read = {name: reader(folder) for name, reader in READERS.items()}
        self.wanted = {}
        for name, raw in files.items():
            (self.folder / name).write_bytes(raw)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self.wanted[name] = self.read[name](self.folder / name)
                (self.folder / name).write_bytes(b"")
                with suppress(HawqError):  # what is imported when something is refused
                    self.read[name](self.folder / name)

    def judge(self, kind: str, raw: bytes) -> str:
        """``refused``, ``identical``, ``told``, ``anew``, ``resealed``, ``unsealed`` or ``FAILED: ...``."""
        name = KINDS[kind][0]
        (self.folder / name).write_bytes(raw)
        self.watch.seen.clear()
        self.watch.allowed = READERS[name].allowed
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            self.watch.on = True
            try:
                value = self.read[name](self.folder / name)
            except HawqError as error:
                verdict = "refused" if str(error) else "FAILED: refused without a word"
            except BaseException as error:
                verdict = f"FAILED: {type(error).__name__}: {error}"
            else:
                self.watch.on = False
                verdict = self._loaded(kind, value, [str(w.message) for w in told])
            finally:
                self.watch.on = False
        if self.watch.seen:
            verdict = f"FAILED: {self.watch.seen[0]}"
        if (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 > MEMORY:
            verdict = "FAILED: takes more than 1 GiB"
        return verdict

    def _loaded(self, kind: str, value: object, told: list[str]) -> str:
        name = KINDS[kind][0]
        if READERS[name].equal(value, self.wanted[name]):
            return "identical"
        if any(words in text for text in told for words in _TOLD):
            return "anew" if any(_ANEW in text for text in told) else "told"
        if value is None and any(_ANEW in text for text in told):
            return "anew"
        if kind.endswith("resealed") or READERS[name].unsealed((self.folder / name).read_bytes()):
            return "resealed" if kind.endswith("resealed") else "unsealed"
        return "FAILED: loads as something else, silently"


def campaign(count: int, seed: int, folder: Path) -> dict:
    """Damage ``count`` files; what came of it. A child does the loading, so that a crash of it is seen."""
    child_files = os.fork()
    if child_files == 0:
        make(folder)
        os._exit(0)
    os.waitpid(child_files, 0)
    files = {name: (folder / name).read_bytes() for name in READERS}
    found, failures, next_one = Counter(), [], 0
    kinds = list(KINDS)
    while next_one < count:
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(read)
            _child(folder, files, kinds, next_one, count, seed, write)
        os.close(write)
        with os.fdopen(read) as lines:
            for line in lines:
                number, kind, verdict = json.loads(line)
                if verdict.startswith("FAILED"):
                    failures.append({"mutation": number, "kind": kind, "what": verdict})
                    print(json.dumps(failures[-1]), file=sys.stderr, flush=True)
                found[f"{kind}: {verdict.split(':')[0]}"] += 1
                next_one = number + 1
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if status != 0:
            kind = kinds[next_one % len(kinds)]
            failures.append({"mutation": next_one, "kind": kind, "what": f"FAILED: the process ended with {status}"})
            found[f"{kind}: FAILED"] += 1
            next_one += 1
    bits = {s["name"]: s["bits"] for s in json.loads(files["plan.json"])["sites"]}
    outcomes = dict(sorted(found.items()))
    return {"bits": bits, "mutations": count, "seed": seed, "outcomes": outcomes, "failures": failures}


def _child(folder, files, kinds, first, count, seed, write) -> None:
    status = 1
    try:
        loads = Loads(folder, files)
        with os.fdopen(write, "w") as out:
            for number in range(first, count):
                kind = kinds[number % len(kinds)]
                name, damage = KINDS[kind]
                raw = damage(files[name], random.Random(f"{seed} {number}"))
                signal.alarm(SECONDS)
                verdict = loads.judge(kind, raw)
                signal.alarm(0)
                out.write(json.dumps([number, kind, verdict]) + "\n")
                out.flush()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="hawq_lightning-mutations-") as place:
        result = campaign(int(sys.argv[1]), int(sys.argv[2]), Path(place))
    print(json.dumps(result, indent=1))
    sys.exit(bool(result["failures"]))
