"""``PROBES_PER_STEP`` probes of a batch by any estimator; in parts where memory runs out."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from hawq_lightning._errors import HawqError
from hawq_lightning.sensitivity._context import MeasureContext
from hawq_lightning.sensitivity._double_backward import gaussian, rademacher
from hawq_lightning.sensitivity._ggn import RademacherProbes, concave_share, probe_batch
from hawq_lightning.sensitivity._hutchinson import hessian_batch, hutchinson_batch
from hawq_lightning.sensitivity._microbatch import RAN_OUT, ImagesOf, loss_reduction, out_of_memory, take
from hawq_lightning.sensitivity._statistics import AllSum

PROBES_PER_STEP = 2
_SLIGHT = 0.05  # share of concave curvature up to which it need not be probed every time
_CONCAVE_EVERY = 8  # it then counts so often in every eighth probe: one backward pass a probe instead of two


@dataclass
class ProbeRunner:
    """How to probe a batch.

    Args:
        setting: model, loss and sites.
        estimator: ``ggn``, ``hessian``, ``hutchinson`` or ``exact``.
        per_image: site -> whether Gauss-Newton rows are images.
        batch_size_fn: number of images in a batch.
        distribution: of Hutchinson's vectors.
        rotate: rotate the signs onto the softmax factor.
        curved: for ``hessian``: where the network is not piecewise linear.
        seed: of all draws.
        largest: images at a time at the most; shrinks when memory runs out.

    Attributes:
        thin: the concave part of the loss goes back with every so many probes.
    """

    setting: MeasureContext
    estimator: str
    per_image: dict[str, bool]
    batch_size_fn: ImagesOf
    distribution: str = "rademacher"
    rotate: bool = True
    curved: tuple[str, ...] = ()
    seed: int = 0
    largest: int | None = None
    thin: int = field(default=1, init=False)
    _elementwise: set[int] = field(default_factory=set, init=False)
    _kind: str = field(default="", init=False)

    def row_unit(self) -> dict[str, bool]:
        """Site -> whether a row of the result is an image."""
        whole = self.estimator in ("hutchinson", "hessian")
        weights = {s.name for s in self.setting.table.weights}
        return {n: per and not (whole and n in weights) for n, per in self.per_image.items()}

    def thin_concave(self, first: Sequence[Any], all_reduce_sum: AllSum | None, max_probes: int) -> None:
        """Decide how often the concave part goes back, by its share in ``first``: a batch of each process, if any."""
        self.thin = 1
        if self.estimator != "ggn" or max_probes < 2 * _CONCAVE_EVERY:
            return
        try:
            concave, whole = concave_share(self.setting, first[0]) if first else (0.0, 0.0)
        except Exception as error:
            if not out_of_memory(error):
                raise
            concave = whole = 1.0
        table = torch.tensor([concave, whole], dtype=torch.float64)
        if all_reduce_sum is not None:
            table = all_reduce_sum(table)
        if 0 < float(table[0]) <= _SLIGHT * float(table[1]):
            self.thin = _CONCAVE_EVERY

    def concave(self, probe: int) -> float:
        """How often the concave part counts in a probe."""
        return 0.0 if probe % self.thin else float(self.thin)

    def of_batch(
        self, batch: Any, images: int, number: int, turn: int
    ) -> tuple[list[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
        """``PROBES_PER_STEP`` probes of one batch, in as many parts as memory asks for: rows of each, and sizes."""
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
                self._kind = loss_reduction(self.setting, batch, images, size, self.batch_size_fn)
            except Exception as error:
                if not out_of_memory(error):
                    raise
                size //= 2
        self.largest = size
        self.setting.note_again(RAN_OUT, f": batches were measured {size} images at a time.")

    def _parts(
        self, batch: Any, images: int, size: int, number: int, turn: int
    ) -> tuple[list[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
        if size == images:
            return self._probe(batch, images, turn, mix(self.seed, number, turn), number)
        unit = self.row_unit()
        found: list[list[dict[str, torch.Tensor]]] = []
        all_sizes: list[dict[str, torch.Tensor]] = []
        for start in range(0, images, size):
            stop = min(start + size, images)
            part = take(batch, images, start, stop, self.batch_size_fn)
            if part is None:
                raise HawqError("Memory ran out, and it is not clear how to take images out of this batch.")
            values, sizes = self._probe(part, stop - start, turn, mix(self.seed, number, turn, start))
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
            sizes = hutchinson_batch(setting, batch, images, self.row_unit(), sample, PROBES_PER_STEP, found.append)
        elif self.estimator == "hessian":
            sizes = hessian_batch(
                setting, batch, images, per_image, seed, PROBES_PER_STEP, found.append,
                curved=self.curved, rotate=self.rotate,
            )  # fmt: skip
        else:
            probed = probe_batch(
                setting, batch, images, per_image, RademacherProbes([(images, seed)]), PROBES_PER_STEP,
                rotate=self.rotate, exact=self.estimator == "exact",
                concave=[self.concave(PROBES_PER_STEP * turn + k) for k in range(PROBES_PER_STEP)],
                elementwise=whole in self._elementwise,
            )  # fmt: skip
            found, sizes = probed.rows, probed.sizes
            if probed.elementwise and whole is not None:  # of this batch: the next round need not find out again
                self._elementwise.add(whole)
        return found, sizes


def mix(*numbers: int) -> int:
    """One 63-bit seed from several numbers."""
    return int.from_bytes(hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest(), "little") >> 1
