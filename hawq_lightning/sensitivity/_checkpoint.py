"""An interrupted measurement goes on where it stopped: its statistics in a file, one a process, written atomically."""

from __future__ import annotations

import hashlib
import io
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from hawq_lightning._errors import HawqError
from hawq_lightning._io import write_bytes
from hawq_lightning._types import JsonObject
from hawq_lightning.sensitivity._context import Diagnostics
from hawq_lightning.sensitivity._process_shard import ProcessShard
from hawq_lightning.sensitivity._statistics import TraceStatistics

_EVERY = 5.0  # seconds between files within a step
_DIGEST = 32  # bytes of SHA-256 before the rest
_TABLES = ("mean", "m2", "size")
_FORM_TABLES = ("mean", "m2")


@dataclass(frozen=True)
class Position:
    """Where a measurement goes on.

    Attributes:
        step: number of the step.
        done: how many of this process's batches are in it already.
        started: whether any process has begun the step.
    """

    step: int = 0
    done: int = 0
    started: bool = False


class MeasurementCheckpoint:
    """The file of an unfinished measurement; without a path nothing is kept.

    Args:
        path: where; processes other than the first add their rank to the name.
        key: fingerprint of weights, samples, loss and settings: a file of another measurement is ignored.
        shard: of this process.
        diagnostics: kept and restored with the statistics.
    """

    def __init__(self, path: str | Path | None, key: str, shard: ProcessShard, diagnostics: Diagnostics) -> None:
        self._path = None if path is None else Path(f"{path}.{shard.rank}" if shard.rank else path)
        self._key, self._shard, self._diagnostics = key, shard, diagnostics
        self._last = time.perf_counter()

    def restore(self, statistics: TraceStatistics) -> Position:
        """Fill ``statistics`` from the file, if all processes stopped in the same step; else begin afresh."""
        state = self._read(statistics)
        started = 0.0 if state is None else float(state["done"])
        if self._shard.all_reduce_sum is not None and self._path is not None:
            # processes that stopped in different steps would wait for each other: all begin afresh
            step = -1.0 if state is None else float(state["step"])
            total = self._shard.sum(torch.tensor([step, step * step, started], dtype=torch.float64))
            started = float(total[2])
            # n sum x^2 = (sum x)^2 exactly where all x are equal
            if float(total[1]) * self._shard.world != float(total[0]) ** 2:
                state = None
        if state is None:
            return Position()
        for name in _TABLES:
            setattr(statistics, name, state[name])
        for name in _FORM_TABLES if statistics.forms.mean else ():
            setattr(statistics.forms, name, state["forms"][name])
        statistics.counts[:] = state["count"]
        self._diagnostics.figures.update(state["figures"])
        self._diagnostics.notes.extend(n for n in state["notes"] if n not in self._diagnostics.notes)
        return Position(state["step"], state["done"], started > 0)

    def _read(self, statistics: TraceStatistics) -> JsonObject | None:
        if self._path is None or not self._path.is_file():
            return None
        try:
            raw = self._path.read_bytes()
            data = raw[_DIGEST:]
            if raw[:_DIGEST] != hashlib.sha256(data).digest():  # torch.load takes damaged numbers for good
                return None
            state = torch.load(io.BytesIO(data), weights_only=True)
            fits = state["key"] == self._key and _fits(state, statistics)
        except Exception:  # cut short or of something else: measured again
            return None
        return state if fits else None

    def save(self, statistics: TraceStatistics, step: int, done: int) -> None:
        """Keep what there is, at the end of a step and every few seconds within.

        Args:
            statistics: of this process.
            step: number of the step that goes on.
            done: how many of this process's batches are in it.
        """
        if self._path is None or (done and 0 <= time.perf_counter() - self._last < _EVERY):
            return  # (a clock that went back is no reason to keep nothing)
        self._last = time.perf_counter()
        state: JsonObject = {n: getattr(statistics, n) for n in _TABLES}
        if statistics.forms.mean:
            state["forms"] = {n: getattr(statistics.forms, n) for n in _FORM_TABLES}
        state |= {"key": self._key, "step": step, "done": done, "count": list(statistics.counts)}
        state |= {"figures": dict(self._diagnostics.figures), "notes": list(self._diagnostics.notes)}
        buffer = io.BytesIO()
        torch.save(state, buffer)
        data = buffer.getvalue()
        try:
            write_bytes(self._path, hashlib.sha256(data).digest() + data)
        except HawqError as error:  # only an interruption would need it
            self._diagnostics.warn_once(f"The unfinished measurement cannot be kept: {error}")
            self._path = None

    def delete(self) -> None:
        """The result is complete; the file goes."""
        if self._path is not None:
            with suppress(OSError):
                self._path.unlink(missing_ok=True)


def _fits(state: JsonObject, statistics: TraceStatistics) -> bool:
    """Whether a state has the form of these statistics."""
    tables = [(state[name], getattr(statistics, name)) for name in _TABLES]
    if statistics.forms.mean:
        tables += [(state["forms"][name], getattr(statistics.forms, name)) for name in _FORM_TABLES]
    have: dict[str, torch.Tensor]
    want: dict[str, torch.Tensor]
    for have, want in tables:
        if {k: (v.shape, v.dtype) for k, v in have.items()} != {k: (v.shape, v.dtype) for k, v in want.items()}:
            return False
        if not all(bool(v.isfinite().all()) for v in have.values()):
            return False
    numbers = [state["step"], state["done"], *state["count"]]
    if len(state["count"]) != len(statistics.counts) or any(type(n) is not int or n < 0 for n in numbers):
        return False
    figures: dict[str, object] = dict(state["figures"])
    return all(isinstance(n, str) for n in (*figures, *state["notes"]))
