"""Rounds of probes over all batches, until the errors are small; resumable."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch

from hawq_lightning._errors import HawqError
from hawq_lightning._progress import Bar, progress_bar
from hawq_lightning.sensitivity._checkpoint import MeasurementCheckpoint
from hawq_lightning.sensitivity._ggn import pool_curvature
from hawq_lightning.sensitivity._importance_sampler import ImportanceSampler, NotDrawableError
from hawq_lightning.sensitivity._isolate import Heap, release_memory
from hawq_lightning.sensitivity._microbatch import out_of_memory
from hawq_lightning.sensitivity._probe_runner import PROBES_PER_STEP, ProbeRunner, mix
from hawq_lightning.sensitivity._sampling import design, pays_off
from hawq_lightning.sensitivity._significance import SIGNIFICANT
from hawq_lightning.sensitivity._statistics import AllSum, TraceStatistics

_MIN_FREEDOM = 20  # below it a standard error is itself a guess
_SAFETY = 1.15  # stopping at the first small error picks lucky ones


@dataclass(frozen=True)
class ProcessShard:
    """One process's part of a measurement: every ``world``-th batch from ``rank`` on."""

    rank: int = 0
    world: int = 1
    all_reduce_sum: AllSum | None = None


@dataclass
class TraceLoop:
    """When to stop, and which images each round takes.

    Args:
        probes: how to probe.
        draw: which images a round sends back: ``all``, ``curvature`` or ``auto``.
        enough: asked after round 4 and every 8th: whether what is known will do.
    """

    probes: ProbeRunner
    draw: str = "all"
    enough: Callable[[TraceStatistics], bool] | None = None
    stopped: str = field(default="", init=False)
    drawn: ImportanceSampler | None = field(default=None, init=False)
    _heap: Heap = field(default_factory=Heap, init=False)

    def until(
        self,
        kept: Sequence[Any],
        images: Sequence[int],
        rows: TraceStatistics,
        share: ProcessShard,
        rtol: float,
        max_probes: int,
        progress: bool | Bar,
        partial: MeasurementCheckpoint,
    ) -> TraceStatistics:
        """Fill ``rows`` until every site's standard error is below ``rtol`` of its trace; the sum over processes."""
        mine = range(share.rank, len(kept), share.world)
        bar = nullcontext(progress) if isinstance(progress, Bar) else progress_bar(progress and share.rank == 0)
        with bar as shown:
            empty = rows.fresh()
            self.probes.thin_concave([kept[mine[0]]] if len(mine) else [], share.all_reduce_sum, max_probes)
            release_memory()  # what it took to get ready
            try:
                self.drawn = self._drawing(kept, images, mine, share, shown)
                return self._until(kept, images, mine, rows, share, rtol, max_probes, shown, partial)
            except NotDrawableError as reason:
                if self.draw == "curvature":
                    raise HawqError(f"draw='curvature' is impossible: {reason}; use 'auto' or 'all'.") from None
            self.drawn = None
            return self._until(kept, images, mine, empty, share, rtol, max_probes, shown, partial)

    def _until(
        self,
        kept: Sequence[Any],
        images: Sequence[int],
        mine: Sequence[int],
        rows: TraceStatistics,
        share: ProcessShard,
        rtol: float,
        max_probes: int,
        shown: Bar,
        partial: MeasurementCheckpoint,
    ) -> TraceStatistics:
        exact = self.probes.estimator == "exact"
        each = PROBES_PER_STEP if self.drawn is None else 1
        # of each image, on average
        work = float(each if self.drawn is None else self.drawn.design.probability.mean())
        task = shown.begin("Hessian traces", len(mine))
        turn, first, begun = partial.restore(rows, share)
        while True:
            if turn and not begun:  # a round has ended, here or before an interruption
                rows.probes = 1 if exact else each * turn
                final = rows.gathered(share.all_reduce_sum)
                if exact:
                    self.stopped = "exact"
                    return final
                # in between, the concave part has been counted too often or not yet
                if each * turn % self.probes.thin == 0:
                    worst, name = _worst(final, rtol)
                    free = min(final.freedom(s.name) for s in self.probes.setting.table)
                    if worst <= rtol / _SAFETY and free >= _MIN_FREEDOM:
                        self.stopped = "error"
                        return final
                    if self.enough is not None and (turn == 4 or turn % 8 == 0) and self.enough(final):
                        self.stopped = "enough"
                        return final
                    if work * (turn + max(1, self.probes.thin // each)) > max_probes:
                        self.stopped = "max_probes"
                        self.probes.setting.note(
                            f"Stopped at {work * turn:.3g} probes an image with a standard error of {worst:.1%} at "
                            f"{name}."
                        )
                        return final
                    if self.drawn is None or turn % 8 == 0:
                        task = shown.begin(f"Hessian traces, error {worst:.1%} at {name}", len(mine))
            if self.drawn is not None:
                self._drawn_round(self.drawn, turn, rows, share, self.probes.concave(turn))
            else:
                for done, b in enumerate(mine):
                    if done < first:
                        continue
                    self._batch(kept[b], images[b], b, turn, rows)
                    self._heap.tidy()
                    shown.advance(task, done + 1)
                    partial.save(rows, turn, done + 1)
            turn, first, begun = turn + 1, 0, False
            partial.save(rows, turn, 0)

    @staticmethod
    def _drawn_round(
        drawn: ImportanceSampler, turn: int, rows: TraceStatistics, share: ProcessShard, concave: float
    ) -> None:
        """A round of drawn images; what one process cannot draw from, all give up together."""
        failed = ""
        try:
            drawn.round(turn, rows, concave)
        except NotDrawableError as reason:
            failed = str(reason)
        count = torch.tensor([float(bool(failed))], dtype=torch.float64)
        if share.all_reduce_sum is not None:
            count = share.all_reduce_sum(count)
        if float(count):
            raise NotDrawableError(failed or "another process found that losses depend on their batch")

    def _drawing(
        self, kept: Sequence[Any], images: Sequence[int], mine: Sequence[int], share: ProcessShard, shown: Bar
    ) -> ImportanceSampler | None:
        """A design from the curvature of all images' losses, if drawing is possible and pays; else ``None``.

        Raises:
            NotDrawableError: it is not possible.
        """
        if self.draw == "all":
            return None
        if self.probes.estimator != "ggn":
            raise NotDrawableError(f"estimator='{self.probes.estimator}' has whole batches as rows")
        if not all(self.probes.per_image.values()):
            raise NotDrawableError("images cannot be told apart at every site")
        start = [0, *torch.tensor(list(images)).cumsum(0).tolist()]
        # the last entry counts processes that cannot draw: all must go the same way
        table = torch.zeros(start[-1] + 1, dtype=torch.float64)
        task = shown.begin("Curvature at the outputs", len(mine))
        for done, b in enumerate(mine):
            try:
                known = pool_curvature(self.probes.setting, kept[b]) if self.probes.largest is None else None
            except Exception as error:
                if not out_of_memory(error):
                    raise
                known = None
            if known is None or len(known) != images[b]:
                table[-1] += 1
                break
            table[start[b] : start[b + 1]] = known
            self._heap.tidy()
            shown.advance(task, done + 1)
        if share.all_reduce_sum is not None:
            table = share.all_reduce_sum(table)
        if float(table[-1]):
            raise NotDrawableError(
                "the curvature of the loss at the outputs has no closed form, or memory ran out with whole batches"
            )
        weighed = table[:-1] * torch.repeat_interleave(torch.tensor(images), torch.tensor(images))
        found = design(weighed)
        if self.draw == "auto" and not pays_off(found):
            return None
        how = self.probes
        return ImportanceSampler(
            how.setting, how.per_image, how.batch_size_fn, how.rotate, kept, images, mine, table[:-1], found,
            lambda *numbers: mix(how.seed, *numbers), max(images),
        )  # fmt: skip

    def _batch(self, batch: Any, images: int, number: int, turn: int, rows: TraceStatistics) -> None:
        found, sizes = self.probes.of_batch(batch, images, number, turn)
        for values in found:
            rows.add(number, values)
        for site, value in sizes.items():
            rows.size[site][rows.place(site, number)] = value


def _worst(rows: TraceStatistics, rtol: float) -> tuple[float, str]:
    """The largest standard error as a share of its trace, over the sites that still matter.

    A site does not if its upper bound is already below the lowest solid mean trace of its kind: bits are chosen as if
    it had that one (see :mod:`hawq_lightning.sensitivity.guard`), however exactly it is known.
    """
    told = {s.name: (abs(rows.trace(s.name)), rows.stderr(s.name)) for s in rows.table}
    solid: dict[str, float] = {}
    for s in rows.table:
        trace, error = told[s.name]
        if trace > 0 and error <= rtol * trace and rows.trace(s.name) > 0:
            solid[s.kind] = min(solid.get(s.kind, math.inf), trace / s.numel)
    worst, name = 0.0, ""
    for s in rows.table:
        trace, error = told[s.name]
        if error <= worst * trace or (trace + SIGNIFICANT * error) / s.numel <= solid.get(s.kind, 0.0):
            continue
        worst, name = (error / trace if trace > 0 else math.inf), s.name
    return worst, name
