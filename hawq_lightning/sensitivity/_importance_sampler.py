"""Rounds of probes over images drawn by the curvature at their outputs; see :mod:`.draws` for why and how."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from hawq_lightning.sensitivity._context import MeasureContext
from hawq_lightning.sensitivity._ggn import Probed, RademacherProbes, probe_batch
from hawq_lightning.sensitivity._isolate import Heap
from hawq_lightning.sensitivity._microbatch import RAN_OUT, ImagesOf, out_of_memory
from hawq_lightning.sensitivity._sampling import Chunk, SamplingDesign, chunks
from hawq_lightning.sensitivity._statistics import TraceStatistics

_AGREE = 0.05  # share by which an image's curvature may differ between its batch and a drawn one
_SOLID = 1e-3  # of the largest curvature: below it rounding rules


class NotDrawableError(Exception):
    """Images of this loss cannot be taken out of their batches; the message says why."""


@dataclass
class ImportanceSampler:
    """One round after another of drawn images; rows of images that were not drawn get zeros.

    Args:
        setting: model, loss and sites.
        per_image: all true: rows are images everywhere.
        batch_size_fn: number of images in a batch.
        rotate: rotate the signs onto the softmax factor.
        kept: all batches.
        images: number of images of each.
        mine: batches of this process.
        curvature: of every image's loss at the outputs, in its batch.
        design: probabilities, one an image.
        seed_of: a seed from several numbers.
        largest: images at a time.
    """

    setting: MeasureContext
    per_image: dict[str, bool]
    batch_size_fn: ImagesOf
    rotate: bool
    kept: Sequence[Any]
    images: Sequence[int]
    mine: Sequence[int]
    curvature: torch.Tensor
    design: SamplingDesign
    seed_of: Callable[..., int]
    largest: int
    _kind: str = field(default="", init=False)
    _heap: Heap = field(default_factory=Heap, init=False)

    def __post_init__(self) -> None:
        self._start = [0, *torch.tensor(list(self.images)).cumsum(0).tolist()]

    def _of(self, batch: int, table: torch.Tensor) -> torch.Tensor:
        return table[self._start[batch] : self._start[batch + 1]]

    def round(self, turn: int, rows: TraceStatistics, concave: float = 1.0) -> None:
        """Draw images, send one probe back for each, and add what they give to ``rows``.

        Args:
            turn: number of the round.
            rows: the table.
            concave: how often the concave part of the loss counts in this probe.

        Raises:
            NotDrawableError: the images' losses depend on the batch that they are in.
        """
        chosen = []
        for b in self.mine:
            generator = torch.Generator().manual_seed(self.seed_of(turn, b, 0))
            drawn = torch.rand(self.images[b], generator=generator, dtype=torch.float64) < self._of(
                b, self.design.probability
            )
            chosen.append((b, drawn.nonzero()[:, 0]))
        found = {
            b: {s.name: torch.zeros(self.images[b], dtype=torch.float64) for s in self.setting.table} for b in self.mine
        }
        try:
            work = chunks(self.kept, self.images, chosen, self.largest, self.batch_size_fn)
        except LookupError:
            raise NotDrawableError("it is not clear how to take images out of a batch") from None
        while work:
            chunk = work.pop(0)
            try:
                probed = self._probe(chunk, turn, concave)
            except Exception as error:
                if not out_of_memory(error) or chunk.images < 2:
                    raise
                probed = None
            if probed is None:  # outside of the handler, so that the graph is gone
                self.largest = max(1, chunk.images // 2)
                work = chunks(self.kept, self.images, chunk.segments, self.largest, self.batch_size_fn) + work
                self.setting.note_again(RAN_OUT, f": drawn images were measured {self.largest} at a time.")
                continue
            self._scatter(chunk, probed, found, rows)
            self._heap.tidy()
        for b in self.mine:
            rows.add(b, found[b])

    def _probe(self, chunk: Chunk, turn: int, concave: float) -> Probed:
        signs = RademacherProbes([(len(ids), self.seed_of(turn, b, 1 + int(ids[0]))) for b, ids in chunk.segments])
        return probe_batch(
            self.setting, chunk.batch, chunk.images, self.per_image, signs, 1,
            rotate=self.rotate, curvature=True, concave=[concave],
        )  # fmt: skip

    def _scatter(
        self, chunk: Chunk, probed: Probed, found: dict[int, dict[str, torch.Tensor]], rows: TraceStatistics
    ) -> None:
        self._check(chunk, probed)
        at = 0
        for b, ids in chunk.segments:
            mine = slice(at, at + len(ids))
            at += len(ids)
            # rows are of the batch's loss: a mean over fewer images weighs each of them more
            share = (chunk.images / self.images[b]) if self._kind != "sum" else 1.0
            weight = share / self._of(b, self.design.probability)[ids]
            for site, value in probed.rows[0].items():
                found[b][site][ids] = weight * value[mine]
            for site, size in probed.sizes.items():
                rows.size[site][rows.place(site, b)][ids] = size[mine]  # a slice is a view

    def _check(self, chunk: Chunk, probed: Probed) -> None:
        """Every image's loss must be what it was in its own batch, but for the mean's 1/N."""
        assert probed.curvature is not None
        before = torch.cat([self._of(b, self.curvature)[ids] for b, ids in chunk.segments])
        size = torch.cat([torch.full((len(ids),), float(self.images[b])) for b, ids in chunk.segments])
        top = float(self.curvature.max())
        for kind, now in (("mean", probed.curvature * chunk.images / size), ("sum", probed.curvature)):
            if self._kind in ("", kind) and bool(((now - before).abs() <= _AGREE * before + _SOLID * top).all()):
                if bool((size != chunk.images).any()):  # else it fits both
                    self._kind = kind
                return
        raise NotDrawableError("the loss of an image depends on the batch that it is in")
