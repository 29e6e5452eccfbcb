"""Rounds of probes over all batches, until the errors are small; in parts where memory runs out; resumable."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch

from hawq_lightning.errors import HawqError
from hawq_lightning.progress import Bar, progress_bar
from hawq_lightning.sensitivity.drawn import Drawn, NotDrawableError
from hawq_lightning.sensitivity.draws import design, worth
from hawq_lightning.sensitivity.forward import Setting
from hawq_lightning.sensitivity.ggn import Signs, concave_share, pool_curvature, probe_batch
from hawq_lightning.sensitivity.guard import SIGNIFICANT
from hawq_lightning.sensitivity.hutchinson import hessian_batch, hutchinson_batch
from hawq_lightning.sensitivity.parts import ImagesOf, out_of_memory, scale_of_parts, take
from hawq_lightning.sensitivity.quiet import release_memory
from hawq_lightning.sensitivity.resume import Partial
from hawq_lightning.sensitivity.rows import AllSum, Rows
from hawq_lightning.sensitivity.slopes import gaussian, rademacher

PER_ROUND = 2
_MIN_FREEDOM = 20  # below it a standard error is itself a guess
_SLIGHT = 0.05  # share of concave curvature up to which it need not be probed every time
_THIN = 8  # it then counts so often in every eighth probe: one backward pass a probe instead of two
_SAFETY = 1.15  # stopping at the first small error picks lucky ones


@dataclass(frozen=True)
class Share:
    """One process's part of a measurement: every ``world``-th batch from ``rank`` on, tables added by ``all_sum``."""

    rank: int = 0
    world: int = 1
    all_sum: AllSum | None = None


@dataclass
class Rounds:
    """How to probe.

    Args:
        setting: model, loss and sites.
        estimator: ``ggn``, ``hessian``, ``hutchinson`` or ``exact``.
        per_image: site -> whether Gauss-Newton rows are images.
        images_of: number of images in a batch.
        distribution: of Hutchinson's vectors.
        rotate: rotate the signs onto the softmax factor.
        curved: for ``hessian``: where the network is not piecewise linear.
        seed: of all draws.
        largest: images at a time at the most; shrinks when memory runs out.
        draw: which images a round sends back: ``all``, ``curvature`` or ``auto``.
        enough: asked after round 4 and every 8th: whether what is known will do.
    """

    setting: Setting
    estimator: str
    per_image: dict[str, bool]
    images_of: ImagesOf
    distribution: str = "rademacher"
    rotate: bool = True
    curved: tuple[str, ...] = ()
    seed: int = 0
    largest: int | None = None
    draw: str = "all"
    enough: Callable[[Rows], bool] | None = None
    stopped: str = field(default="", init=False)
    drawn: Drawn | None = field(default=None, init=False)
    _thin: int = field(default=1, init=False)
    _elementwise: set[int] = field(default_factory=set, init=False)
    _kind: str = field(default="", init=False)

    def row_unit(self) -> dict[str, bool]:
        """Site -> whether a row of the result is an image."""
        whole = self.estimator in ("hutchinson", "hessian")
        weights = {s.name for s in self.setting.table.weights}
        return {n: per and not (whole and n in weights) for n, per in self.per_image.items()}

    def until(
        self, kept: Sequence[Any], images: Sequence[int], rows: Rows, share: Share, rtol: float, max_probes: int,
        progress: bool | Bar, partial: Partial,
    ) -> Rows:  # fmt: skip
        """Fill ``rows`` until every site's standard error is below ``rtol`` of its trace; the sum over processes."""
        mine = range(share.rank, len(kept), share.world)
        bar = nullcontext(progress) if isinstance(progress, Bar) else progress_bar(progress and share.rank == 0)
        with bar as shown:
            empty = rows.fresh()
            self._thin = self.thinned(kept, mine, share, max_probes)
            try:
                self.drawn = self._drawing(kept, images, mine, share, shown)
                return self._until(kept, images, mine, rows, share, rtol, max_probes, shown, partial)
            except NotDrawableError as reason:
                if self.draw == "curvature":
                    raise HawqError(f"draw='curvature' is impossible: {reason}; use 'auto' or 'all'.") from None
            self.drawn = None
            return self._until(kept, images, mine, empty, share, rtol, max_probes, shown, partial)

    def _until(
        self, kept: Sequence[Any], images: Sequence[int], mine: Sequence[int], rows: Rows, share: Share, rtol: float,
        max_probes: int, shown: Bar, partial: Partial,
    ) -> Rows:  # fmt: skip
        exact = self.estimator == "exact"
        each = PER_ROUND if self.drawn is None else 1
        # of each image, on average
        work = float(each if self.drawn is None else self.drawn.design.probability.mean())
        task = shown.begin("Hessian traces", len(mine))
        turn, first, begun = partial.restore(rows, share)
        while True:
            if turn and not begun:  # a round has ended, here or before an interruption
                rows.probes = 1 if exact else each * turn
                final = rows.gathered(share.all_sum)
                if exact:
                    self.stopped = "exact"
                    return final
                # in between, the concave part has been counted too often or not yet
                if each * turn % self._thin == 0:
                    worst, name = _worst(final, rtol)
                    free = min(final.freedom(s.name) for s in self.setting.table)
                    if worst <= rtol / _SAFETY and free >= _MIN_FREEDOM:
                        self.stopped = "error"
                        return final
                    if self.enough is not None and (turn == 4 or turn % 8 == 0) and self.enough(final):
                        self.stopped = "enough"
                        return final
                    if work * (turn + max(1, self._thin // each)) > max_probes:
                        self.stopped = "max_probes"
                        self.setting.note(
                            f"Stopped at {work * turn:.3g} probes an image with a standard error of {worst:.1%} at "
                            f"{name}."
                        )
                        return final
                    if self.drawn is None or turn % 8 == 0:
                        task = shown.begin(f"Hessian traces, error {worst:.1%} at {name}", len(mine))
            if self.drawn is not None:
                self._drawn_round(self.drawn, turn, rows, share, self._concave(turn))
            else:
                for done, b in enumerate(mine):
                    if done < first:
                        continue
                    self._batch(kept[b], images[b], b, turn, rows)
                    release_memory()
                    shown.advance(task, done + 1)
                    partial.save(rows, turn, done + 1)
            turn, first, begun = turn + 1, 0, False
            partial.save(rows, turn, 0)

    def thinned(self, kept: Sequence[Any], mine: Sequence[int], share: Share, max_probes: int) -> int:
        """Every how many probes to send back the concave part, by its share in the first batch of every process."""
        if self.estimator != "ggn" or max_probes < 2 * _THIN:
            return 1
        try:
            concave, whole = concave_share(self.setting, kept[mine[0]]) if len(mine) else (0.0, 0.0)
        except Exception as error:
            if not out_of_memory(error):
                raise
            concave = whole = 1.0
        table = torch.tensor([concave, whole], dtype=torch.float64)
        if share.all_sum is not None:
            table = share.all_sum(table)
        return _THIN if 0 < float(table[0]) <= _SLIGHT * float(table[1]) else 1

    def _concave(self, probe: int) -> float:
        """How often the concave part counts in a probe."""
        return 0.0 if probe % self._thin else float(self._thin)

    @staticmethod
    def _drawn_round(drawn: Drawn, turn: int, rows: Rows, share: Share, concave: float) -> None:
        """A round of drawn images; what one process cannot draw from, all give up together."""
        failed = ""
        try:
            drawn.round(turn, rows, concave)
        except NotDrawableError as reason:
            failed = str(reason)
        count = torch.tensor([float(bool(failed))], dtype=torch.float64)
        if share.all_sum is not None:
            count = share.all_sum(count)
        if float(count):
            raise NotDrawableError(failed or "another process found that losses depend on their batch")

    def _drawing(
        self, kept: Sequence[Any], images: Sequence[int], mine: Sequence[int], share: Share, shown: Bar
    ) -> Drawn | None:
        """A design from the curvature of all images' losses, if drawing is possible and pays; else ``None``.

        Raises:
            NotDrawableError: it is not possible.
        """
        if self.draw == "all":
            return None
        if self.estimator != "ggn":
            raise NotDrawableError(f"estimator='{self.estimator}' has whole batches as rows")
        if not all(self.per_image.values()):
            raise NotDrawableError("images cannot be told apart at every site")
        start = [0, *torch.tensor(list(images)).cumsum(0).tolist()]
        # the last entry counts processes that cannot draw: all must go the same way
        table = torch.zeros(start[-1] + 1, dtype=torch.float64)
        task = shown.begin("Curvature at the outputs", len(mine))
        for done, b in enumerate(mine):
            try:
                known = pool_curvature(self.setting, kept[b]) if self.largest is None else None
            except Exception as error:
                if not out_of_memory(error):
                    raise
                known = None
            if known is None or len(known) != images[b]:
                table[-1] += 1
                break
            table[start[b] : start[b + 1]] = known
            release_memory()
            shown.advance(task, done + 1)
        if share.all_sum is not None:
            table = share.all_sum(table)
        if float(table[-1]):
            raise NotDrawableError(
                "the curvature of the loss at the outputs has no closed form, or memory ran out with whole batches"
            )
        weighed = table[:-1] * torch.repeat_interleave(torch.tensor(images), torch.tensor(images))
        found = design(weighed)
        if self.draw == "auto" and not worth(found):
            return None
        return Drawn(
            self.setting, self.per_image, self.images_of, self.rotate, kept, images, mine, table[:-1], found,
            lambda *numbers: _mix(self.seed, *numbers), max(images),
        )  # fmt: skip

    def _batch(self, batch: Any, images: int, number: int, turn: int, rows: Rows) -> None:
        found, sizes = self.probes(batch, images, number, turn)
        for values in found:
            rows.add(number, values)
        for site, value in sizes.items():
            rows.size[site][rows.place(site, number)] = value

    def probes(
        self, batch: Any, images: int, number: int, turn: int
    ) -> tuple[list[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
        """``PER_ROUND`` probes of one batch, in as many parts as memory asks for: rows of each, and sizes."""
        while True:
            size = min(images, self.largest or images)
            try:
                return self._parts(batch, images, size, number, turn)
            except Exception as error:
                if not out_of_memory(error):
                    raise
                text = str(error).strip().split("\n")[0]
            # outside of the handler, so that the traceback no longer holds the graph
            if size < 2:
                raise HawqError(f"Memory ran out with a single image at a time: {text}")
            self.settle(batch, images, size // 2)

    def settle(self, batch: Any, images: int, size: int) -> None:
        """Memory ran out: make sure that parts of ``size`` images may stand for a batch, and say so.

        Raises:
            HawqError: they may not.
        """
        if not all(self.per_image.values()):
            raise HawqError(
                "Memory ran out, and the images of a batch cannot be told apart, so it cannot be measured in parts; "
                "use a smaller batch size."
            )
        while not self._kind:
            try:
                self._kind = scale_of_parts(self.setting, batch, images, size, self.images_of)
            except Exception as error:
                if not out_of_memory(error):
                    raise
                size //= 2
        self.largest = size
        self.setting.notes[:] = [n for n in self.setting.notes if not n.startswith("Memory ran out")]
        self.setting.note(f"Memory ran out: batches were measured {size} images at a time.")

    def _parts(
        self, batch: Any, images: int, size: int, number: int, turn: int
    ) -> tuple[list[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
        if size == images:
            return self._probe(batch, images, turn, _mix(self.seed, number, turn), number)
        unit = self.row_unit()
        found: list[list[dict[str, torch.Tensor]]] = []
        all_sizes: list[dict[str, torch.Tensor]] = []
        for start in range(0, images, size):
            stop = min(start + size, images)
            part = take(batch, images, start, stop, self.images_of)
            if part is None:
                raise HawqError("Memory ran out, and it is not clear how to take images out of this batch.")
            values, sizes = self._probe(part, stop - start, turn, _mix(self.seed, number, turn, start))
            share = (stop - start) / images if self._kind == "mean" else 1.0
            found.append([{n: share * v for n, v in rows.items()} for rows in values])
            all_sizes.append(sizes)
        joined = []
        for probe in zip(*found):
            rows: dict[str, torch.Tensor] = {}
            for n in dict.fromkeys(k for p in probe for k in p):
                pieces = [p[n] for p in probe]
                rows[n] = torch.cat(pieces) if unit[n] else torch.stack(pieces).sum(0)
            joined.append(rows)
        return joined, {n: torch.cat([s[n] for s in all_sizes]) for n in all_sizes[0]}

    def _probe(
        self, batch: Any, images: int, turn: int, seed: int, whole: int | None = None
    ) -> tuple[list[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
        found: list[dict[str, torch.Tensor]] = []
        setting, per_image = self.setting, self.per_image
        if self.estimator == "hutchinson":
            generator = torch.Generator().manual_seed(seed)
            sample = (rademacher if self.distribution == "rademacher" else gaussian)(generator)
            sizes = hutchinson_batch(setting, batch, images, self.row_unit(), sample, PER_ROUND, found.append)
        elif self.estimator == "hessian":
            sizes = hessian_batch(
                setting, batch, images, per_image, seed, PER_ROUND, found.append,
                curved=self.curved, rotate=self.rotate,
            )  # fmt: skip
        else:
            probed = probe_batch(
                setting, batch, images, per_image, Signs([(images, seed)]), PER_ROUND,
                rotate=self.rotate, exact=self.estimator == "exact",
                concave=[self._concave(PER_ROUND * turn + k) for k in range(PER_ROUND)],
                elementwise=whole in self._elementwise,
            )  # fmt: skip
            found, sizes = probed.rows, probed.sizes
            if probed.elementwise and whole is not None:  # of this batch: the next round need not find out again
                self._elementwise.add(whole)
        return found, sizes


def _worst(rows: Rows, rtol: float) -> tuple[float, str]:
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


def _mix(*numbers: int) -> int:
    """One 63-bit seed from several numbers."""
    return int.from_bytes(hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest(), "little") >> 1
