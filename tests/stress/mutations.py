"""Damages packed files and plans and loads them: ``python -m tests.stress.mutations COUNT SEED``.

A load must end in HawqError, in the identical network, or (a plan that still makes sense) in a warning that it was
changed. Anything else is a failure: another exception, a signal, more than 10 s, 1 GiB more memory, or an audit event
of code being run, imported or written. ``resealed`` files carry a checksum that is right, as a stranger's would: they
may load as what they say, and must do no harm.
"""

from __future__ import annotations

import copy
import hashlib
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

from hawq_lightning import HawqError, Plan, load_packed, quantize, save_packed
from hawq_lightning.callbacks import ApplyPlan
from hawq_lightning.quantization import enabled_bits
from tests.trainers import Classifier, fit, loader

SECONDS, MEMORY = 10, 1 << 30
FORBIDDEN = ("exec", "compile", "import", "os.system", "os.exec", "os.posix_spawn", "subprocess.", "pickle.",
             "os.remove", "os.rename", "os.rmdir", "shutil.", "socket.", "ctypes.")  # fmt: skip
VALUES = [
    None, True, False, 0, 1, -1, 3, 9, 255, 256, 2**31, 2**40, 2**63, 10**400, -(10**30), 0.0, -0.5, 1e-300, 1e308,
    float("nan"), float("inf"), "", "0", "affine", "codebook", "__import__('os').system('true')", "../../etc/passwd",
    "os.system", "\ud800", "\x00", "é" * 3, "n" * 10000, [], {}, [[]], [0] * 1000, {"_target_": "os.abort"},
    {"__reduce__": ["os.abort", []]},
]  # fmt: skip


class Watch:
    """Notes forbidden audit events while it is on."""

    def __init__(self) -> None:
        self.on, self.seen = False, []
        sys.addaudithook(self._hook)

    def _hook(self, event, args):
        if self.on and (event.startswith(FORBIDDEN) or (event == "open" and _writes(args))):
            self.seen.append(f"{event} {str(args)[:200]}")


def _writes(args) -> bool:
    mode, flags = args[1], args[2]
    return any(c in (mode or "") for c in "wax+") or bool((flags or 0) & (os.O_WRONLY | os.O_RDWR))


def places(value, path=()):
    """Paths of everything inside a JSON value."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from places(inner, (*path, key))


def changed(value, draw):
    """A copy of a JSON value with one thing in it replaced, removed, doubled or renamed."""
    value = copy.deepcopy(value)
    path = draw.choice([p for p in places(value) if p])
    parent = value
    for key in path[:-1]:
        parent = parent[key]
    key, how = path[-1], draw.choice(["replace", "replace", "remove", "double", "rename", "nudge", "nest"])
    if how == "remove":
        del parent[key]
    elif how == "double" and isinstance(parent, list):
        parent.insert(key, parent[key])
    elif how == "rename" and isinstance(parent, dict):
        parent[draw.choice([str(key) + "x", "_target_", "__class__", "bits", ""])] = parent.pop(key)
    elif how == "nudge" and isinstance(parent[key], (int, float)):
        parent[key] = draw.choice([parent[key] + 1, parent[key] - 1, -parent[key], parent[key] * 1e6, str(parent[key])])
    elif how == "nest":
        for _ in range(draw.choice([1, 3, 200])):
            parent[key] = [parent[key]]
    else:
        parent[key] = copy.deepcopy(draw.choice(VALUES))
    return value


def raw_damage(raw: bytes, draw) -> bytes:
    """Bytes with bits flipped, pieces cut, moved, doubled, or rubbish between."""
    data, n = bytearray(raw), len(raw)
    at = draw.choice([draw.randrange(n), draw.randrange(min(n, 400)), n - 1 - draw.randrange(min(n, 400))])
    size = draw.choice([1, 1, 2, 8, draw.randrange(1, n)])
    how = draw.choice(["flip", "flip", "byte", "cut", "delete", "double", "insert", "zero", "swap", "several"])
    if how == "flip":
        data[at] ^= 1 << draw.randrange(8)
    elif how == "byte":
        data[at] = draw.randrange(256)
    elif how == "cut":
        del data[at:]
    elif how == "delete":
        del data[at : at + size]
    elif how == "double":
        data[at:at] = data[at : at + size]
    elif how == "insert":
        data[at:at] = draw.randbytes(size)
    elif how == "zero":
        data[at : at + size] = bytes(len(data[at : at + size]))
    elif how == "swap":
        other = draw.randrange(n)
        data[at], data[other] = data[other], data[at]
    else:
        for _ in range(draw.randrange(2, 20)):
            data[draw.randrange(n)] = draw.randrange(256)
    return bytes(data)


def header_damage(raw: bytes, draw) -> bytes:
    """A packed file whose header, valid JSON, says something else; lengths agree with it."""
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    text = json.dumps(changed(header, draw)).encode("utf-8", "surrogatepass")
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + raw[8 + length :]


def resealed(raw: bytes, draw) -> bytes:
    """A packed file with other sites, entries or values and a checksum that is right."""
    length = int.from_bytes(raw[:8], "little")
    header, data = json.loads(raw[8 : 8 + length]), bytearray(raw[8 + length :])
    meta = header["__metadata__"]
    how = draw.random()
    if how < 0.6:
        meta["sites"] = json.dumps(changed(json.loads(meta["sites"]), draw))
    elif how < 0.8:
        entries = changed({k: v for k, v in header.items() if k != "__metadata__"}, draw)
        header = {"__metadata__": meta, **entries}
    for _ in range(draw.choice([0, 1, 20])):
        data[draw.randrange(len(data))] = draw.randrange(256)
    meta["sha256"] = "0" * 64
    text = json.dumps(header).encode("utf-8", "surrogatepass")
    text += b" " * (-len(text) % 8)
    text = text.replace(b"0" * 64, hashlib.sha256(text + bytes(data)).hexdigest().encode())
    return len(text).to_bytes(8, "little") + text + bytes(data)


def plan_damage(raw: bytes, draw) -> bytes:
    """A plan, valid JSON, with one to three things changed."""
    value = json.loads(raw)
    for _ in range(draw.choice([1, 1, 1, 3])):
        value = changed(value, draw)
    sys.set_int_max_str_digits(0)  # to write numbers of thousands of digits
    try:
        return json.dumps(value, indent=1).encode("utf-8", "surrogatepass")
    finally:
        sys.set_int_max_str_digits(4300)


KINDS = {
    "packed, bytes": ("model.safetensors", raw_damage), "packed, header": ("model.safetensors", header_damage),
    "packed, resealed": ("model.safetensors", resealed), "plan, bytes": ("plan.json", raw_damage),
    "plan, values": ("plan.json", plan_damage),
}  # fmt: skip


def make(folder: Path) -> dict[str, bytes]:
    """The undamaged files."""
    torch.manual_seed(0)
    model = Classifier(width=8)
    callback = fit(folder, model, loader())
    save_packed(model, callback.plan, folder / "model.safetensors")
    return {name: (folder / name).read_bytes() for name in ("plan.json", "model.safetensors")}


def states(model) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in model.state_dict().items()}


def equal(a, b) -> bool:
    return a.keys() == b.keys() and all(torch.equal(v, b[k]) for k, v in a.items())


class Loads:
    """Loads one damaged file and judges what came of it."""

    def __init__(self, folder: Path, files: dict[str, bytes]) -> None:
        self.folder, self.watch = folder, Watch()
        torch.manual_seed(1)
        self.start = Classifier(width=8).eval()
        self.wanted, self.plan = {}, json.loads(files["plan.json"])
        for name, raw in files.items():
            (folder / "loaded").write_bytes(raw)
            self.wanted[name] = states(self._load(name)[0])
        self.float = states(self.start)
        (folder / "loaded").write_bytes(b"")
        for name in files:  # what is imported when something is refused
            with suppress(HawqError):
                self._load(name)

    def _load(self, name: str):
        model = copy.deepcopy(self.start)
        if name == "plan.json":
            plan = Plan.load(self.folder / "loaded")
            ApplyPlan(self.folder / "loaded")
            return quantize(model, plan), plan
        try:
            return load_packed(self.folder / "loaded", model), None
        except HawqError:
            assert equal(states(model), self.float) and not enabled_bits(model), "a refused file changed the model"
            raise

    def judge(self, kind: str, raw: bytes) -> str:
        """``refused``, ``identical``, ``told``, ``resealed`` or ``FAILED: ...``."""
        name = KINDS[kind][0]
        (self.folder / "loaded").write_bytes(raw)
        self.watch.seen.clear()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            self.watch.on = True
            try:
                model, plan = self._load(name)
            except HawqError as error:
                verdict = "refused" if str(error) else "FAILED: refused without a word"
            except BaseException as error:
                verdict = f"FAILED: {type(error).__name__}: {error}"
            else:
                self.watch.on = False
                same = equal(states(model), self.wanted[name]) and (plan is None or self._same_plan(plan))
                if same:
                    verdict = "identical"
                elif any("was changed after" in str(w.message) for w in told):
                    verdict = "told"
                else:
                    verdict = "resealed" if kind.endswith("resealed") else "FAILED: loads as something else, silently"
            finally:
                self.watch.on = False
        if self.watch.seen:
            verdict = f"FAILED: {self.watch.seen[0]}"
        if (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 > MEMORY:
            verdict = "FAILED: takes more than 1 GiB"
        return verdict

    def _same_plan(self, plan: Plan) -> bool:
        mine = json.loads(json.dumps(plan.to_dict()))
        return mine == {key: value for key, value in self.plan.items() if key != "sha256"}


def campaign(count: int, seed: int, folder: Path) -> dict:
    """Damage ``count`` files; what came of it. A child does the loading, so that a crash of it is seen."""
    child_files = os.fork()
    if child_files == 0:
        make(folder)
        os._exit(0)
    os.waitpid(child_files, 0)
    files = {name: (folder / name).read_bytes() for name in ("plan.json", "model.safetensors")}
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
