"""An interrupted measurement goes on where it stopped: its tables in a file, one a process, written atomically."""

from __future__ import annotations

import io
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from hawq_lightning._io import write_bytes
from hawq_lightning.sensitivity._statistics import TraceStatistics

if TYPE_CHECKING:
    from hawq_lightning.sensitivity._trace_loop import ProcessShard

_EVERY = 5.0  # seconds
_TABLES = ("mean", "spread", "size")


class MeasurementCheckpoint:
    """The file of an unfinished measurement; without a path nothing is kept.

    Args:
        path: where; processes other than the first add their rank to the name.
        key: fingerprint of weights, images, loss and settings: a file of another measurement is ignored.
        rank: of this process.
        facts: noticed while measuring, kept and restored with the rows.
        notes: likewise.
    """

    def __init__(
        self,
        path: str | Path | None,
        key: str,
        rank: int = 0,
        facts: dict[str, float] | None = None,
        notes: list[str] | None = None,
    ) -> None:
        self._path = None if path is None else Path(f"{path}.{rank}" if rank else path)
        self._facts, self._notes = {} if facts is None else facts, [] if notes is None else notes
        self._key, self._last = key, time.perf_counter()

    def restore(self, rows: TraceStatistics, share: ProcessShard) -> tuple[int, int, bool]:
        """Fill ``rows``.

        Returns:
            the round to go on with, how many of its batches are done here, and whether any process has begun it.
        """
        state = self._read(rows)
        begun = 0.0 if state is None else float(state["done"])
        if share.all_reduce_sum is not None and self._path is not None:
            # processes that stopped in different rounds would wait for each other: all begin afresh
            turn = -1.0 if state is None else float(state["turn"])
            total = share.all_reduce_sum(torch.tensor([turn, turn * turn, begun], dtype=torch.float64))
            begun = float(total[2])
            if float(total[1]) * share.world != float(total[0]) ** 2:
                state = None
        if state is None:
            return 0, 0, False
        for name in _TABLES:
            setattr(rows, name, state[name])
        rows.counts[:] = state["count"]
        self._facts.update(state["facts"])
        self._notes.extend(n for n in state["notes"] if n not in self._notes)
        return state["turn"], state["done"], begun > 0

    def _read(self, rows: TraceStatistics) -> dict[str, Any] | None:
        if self._path is None or not self._path.is_file():
            return None
        try:
            state = torch.load(self._path, weights_only=True)
            key, _, _ = state["key"], state["facts"], state["notes"]
            fits = key == self._key and all(
                {k: v.shape for k, v in state[n].items()} == {k: v.shape for k, v in getattr(rows, n).items()}
                for n in _TABLES
            )
        except Exception:  # cut short or of something else: measured again
            return None
        return state if fits else None

    def save(self, rows: TraceStatistics, turn: int, done: int) -> None:
        """Keep what is known by now, at the end of a round and every few seconds within."""
        if self._path is None or (done and time.perf_counter() - self._last < _EVERY):
            return
        self._last = time.perf_counter()
        state = {n: getattr(rows, n) for n in _TABLES}
        state |= {"key": self._key, "turn": turn, "done": done, "count": list(rows.counts)}
        state |= {"facts": dict(self._facts), "notes": list(self._notes)}
        data = io.BytesIO()
        torch.save(state, data)
        write_bytes(self._path, data.getvalue())

    def finish(self) -> None:
        """The result is complete; the file goes."""
        if self._path is not None:
            self._path.unlink(missing_ok=True)
