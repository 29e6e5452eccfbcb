"""Where a benchmark runs: seconds that wait for a GPU, peaks of its memory, and what the tables call it."""

from __future__ import annotations

import argparse
import contextlib
import platform
import resource
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

PRECISIONS = ("float32", "tf32", "bf16")


def add_device(parser: argparse.ArgumentParser) -> None:
    """``--device`` and ``--precision``."""
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="no table was made on a GPU yet")
    parser.add_argument("--precision", choices=PRECISIONS, default="float32", help="tf32: of a GPU; bf16: autocast")


def prepare(device: str, precision: str = "float32") -> contextlib.AbstractContextManager[Any]:
    """Set TF32 as asked, and give the context of a forward pass.

    Raises:
        SystemExit: there is no such device.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("error: this machine has no GPU.")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision == "tf32"
    return torch.autocast(device, torch.bfloat16) if precision == "bf16" else contextlib.nullcontext()


def now(device: str, wall: bool = False) -> float:
    """Seconds: of a GPU once it has nothing left to do; of the CPU those of this process, or of the wall."""
    if device == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.perf_counter() if wall else time.process_time()


class Peak:
    """Memory in MiB beyond what was held when this was made: the GPU's allocator's, or the resident set."""

    def __init__(self, device: str) -> None:
        self.device = device
        if device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        self.before = self._held()

    def _held(self) -> float:
        if self.device == "cuda":
            return torch.cuda.memory_allocated() / 2**20
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20

    def __call__(self) -> float:
        """MiB so far."""
        if self.device == "cuda":
            return torch.cuda.max_memory_allocated() / 2**20 - self.before
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - self.before


def moved(value: Any, device: str) -> Any:
    """Nested tensors on the device."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        return {k: moved(v, device) for k, v in value.items()}
    return type(value)(moved(v, device) for v in value) if isinstance(value, Sequence) else value


def machine(device: str) -> str:
    """The card, or the CPU."""
    if device == "cuda":
        return f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}"
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":")[1].strip()
    return platform.processor()


def suffixed(name: str, device: str, precision: str = "float32") -> str:
    """The name of a table: those of the CPU in float32 have the plain one."""
    return name + (f"_{device}" if device != "cpu" else "") + (f"_{precision}" if precision != "float32" else "")
