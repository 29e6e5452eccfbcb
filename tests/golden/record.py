"""Write a record of every golden run: ``python -m tests.golden.record OUT [--only NAME ...]``."""

from __future__ import annotations

import argparse
import gzip
import json
import platform
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from tests.golden.runs import ROOT, RUNS, SHARED, record_of

STORED = Path(__file__).with_name("stored.json.gz")
PACKAGES = ("torch", "numpy", "scipy", "lightning", "torchvision", "torchmetrics", "onnx", "onnxruntime", "pillow")


def machine() -> dict[str, Any]:
    """What bits depend on: processor, versions, threads."""
    lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0] if Path("/proc/cpuinfo").is_file() else ""
    known = dict(line.replace("\t", "").split(":", 1) for line in lines.splitlines() if ":" in line)
    cpu = " ".join(known.get(k, "").strip() for k in ("model name", "cpu family", "model")).strip()
    found: dict[str, Any] = {
        "cpu": cpu or platform.processor(), "instructions": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(), "threads": 1,
    }  # fmt: skip
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "absent"
    return found


def commit() -> str:
    """The commit of the package; a plus sign: with changes."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True).stdout.strip()

    return git("log", "-1", "--format=%h", "--", "hawq_lightning", "conf") + (
        "+" if git("status", "--porcelain", "--", "hawq_lightning", "conf") else ""
    )


def write(path: Path, content: dict[str, Any]) -> None:
    """The same content gives the same bytes."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    path.write_bytes(gzip.compress(text.encode(), 9, mtime=0))


def read(path: Path) -> dict[str, Any]:
    """What :func:`write` wrote."""
    return json.loads(gzip.decompress(path.read_bytes()))


def main(arguments: list[str] | None = None) -> int:
    """See the module."""
    parser = argparse.ArgumentParser(prog="python -m tests.golden.record", description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--only", nargs="+", default=list(RUNS), choices=list(RUNS), metavar="NAME")
    parser.add_argument("--into", type=Path, help="keep the other runs of this record, such as the stored one")
    asked = parser.parse_args(arguments)
    here, kept = machine(), read(asked.into) if asked.into else None
    runs = kept["runs"] if kept else {}
    if kept and kept["machine"] != here:
        differ = {k: (v, here.get(k)) for k, v in kept["machine"].items() if here.get(k) != v}
        parser.error(f"{asked.into} is of another machine: {differ}")
    for name in asked.only:
        if RUNS[name].shared and SHARED is None:
            print(f"{name:24} left out: needs shared/data beside the checkout", flush=True)
            continue
        began = time.perf_counter()
        runs[name] = record_of(name)
        print(f"{name:24} {len(runs[name]):5} values {time.perf_counter() - began:6.1f} s", flush=True)
    write(asked.out, {"machine": here, "commit": commit(), "runs": runs})
    return 0


if __name__ == "__main__":
    sys.exit(main())
