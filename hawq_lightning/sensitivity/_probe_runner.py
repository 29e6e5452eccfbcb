"""One step of an estimator on one batch, in parts where memory runs out; and steps over all batches as they are."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from hawq_lightning._errors import HawqError
from hawq_lightning._types import Batch, BatchSizeFn
from hawq_lightning.sensitivity._batch_set import BatchSet
from hawq_lightning.sensitivity._context import MeasureContext
from hawq_lightning.sensitivity._estimator import Estimator, ProbeRequest, Probes
from hawq_lightning.sensitivity._grad_capture import with_copies
from hawq_lightning.sensitivity._heap import Heap
from hawq_lightning.sensitivity._memory import RAN_OUT, RanOut, with_fewer
from hawq_lightning.sensitivity._microbatch import loss_reduction, slice_batch
from hawq_lightning.sensitivity._seeds import derive_seed
from hawq_lightning.sensitivity._statistics import TraceStatistics


@dataclass
class ProbeRunner:
    """How a batch is probed.

    Args:
        context: model, loss and sites.
        estimator: prepared.
        per_sample: site -> whether samples can be told apart there.
        batch_size_fn: number of samples in a batch.
        seed: of the measurement.
        largest: samples at a time at the most; falls when memory runs out; ``None``: whole batches.
    """

    context: MeasureContext
    estimator: Estimator
    per_sample: Mapping[str, bool]
    batch_size_fn: BatchSizeFn
    seed: int = 0
    largest: int | None = None
    _reduction: str = field(default="", init=False)

    def probe(self, batch: Batch, samples: int, number: int, step: int) -> Probes:
        """One step of a batch, in as many parts as memory asks for.

        Args:
            batch: a whole batch.
            samples: its number of samples.
            number: of the batch.
            step: number of the step.

        Raises:
            HawqError: memory runs out, and the batch cannot be measured in smaller parts.
        """

        def fewer(size: int, ran_out: RanOut) -> int:
            if size < 2:
                raise HawqError(f"{RAN_OUT} with a single image at a time: {ran_out}")
            return self.enable_microbatching(batch, samples, size // 2)

        def run(size: int) -> Probes:
            return self._parts(batch, samples, size, number, step)

        return with_fewer(run, min(samples, self.largest or samples), fewer)[0]

    def enable_microbatching(self, batch: Batch, samples: int, size: int) -> int:
        """Make sure that parts may stand for a batch, and say so.

        Args:
            batch: a whole batch.
            samples: its number of samples.
            size: samples that a part is to have.

        Returns:
            samples that a part has; fewer where memory runs out again meanwhile.

        Raises:
            HawqError: parts do not add up to the batch.
        """
        if not all(self.per_sample.values()):
            raise HawqError(
                "Memory ran out, and the images of a batch cannot be told apart, so it cannot be measured in parts; "
                "use a smaller batch size."
            )
        if not self._reduction:
            self._reduction, size = with_fewer(
                lambda n: loss_reduction(self.context, batch, samples, n, self.batch_size_fn),
                size,
                lambda n, ran_out: n // 2,
            )
        self.largest = size
        self.context.diagnostics.replace_warning(RAN_OUT, f": batches were measured {size} images at a time.")
        return size

    def _parts(self, batch: Batch, samples: int, size: int, number: int, step: int) -> Probes:
        if size == samples:
            return self._probe(batch, samples, step, derive_seed(self.seed, number, step), number)
        parts: list[Probes] = []
        for start in range(0, samples, size):
            stop = min(start + size, samples)
            part = slice_batch(batch, samples, start, stop, self.batch_size_fn)
            if part is None:
                raise HawqError("Memory ran out, and it is not clear how to take images out of this batch.")
            probes = self._probe(part, stop - start, step, derive_seed(self.seed, number, step, start))
            # rows are of the batch's loss: a mean over fewer samples weighs each of them more
            scale = (stop - start) / samples if self._reduction == "mean" else 1.0
            rows, forms = (
                [{n: scale * v for n, v in of_probe.items()} for of_probe in tables]
                for tables in (probes.rows, probes.forms)
            )
            parts.append(Probes(rows, probes.sizes, forms=forms))
        counts = [min(size, samples - start) for start in range(0, samples, size)]
        return join_parts(parts, counts, self.estimator.row_unit(self.context, self.per_sample))

    def _probe(self, batch: Batch, samples: int, step: int, seed: int, number: int | None = None) -> Probes:
        estimator = self.estimator
        request = ProbeRequest(
            batch, samples, self.per_sample, [(samples, seed)], estimator.probes_per_step,
            first_probe=estimator.probes_per_step * step, batch_number=number,
        )  # fmt: skip
        try:
            return with_copies(self.context.diagnostics.overwritten, lambda: estimator.probe(self.context, request))
        except RuntimeError as error:
            if estimator.second_derivatives and _lacks_second_derivative(error):
                reason = str(error).strip().split("\n")[0].rstrip(".")
                raise HawqError(
                    f"estimator={estimator.name!r} needs double backward through the network: {reason}. Use 'ggn'."
                ) from error
            raise


def join_parts(parts: list[Probes], samples: Sequence[int], row_unit: Mapping[str, bool]) -> Probes:
    """The rows of a batch from those of its parts: one after the other where rows are samples, else added up.

    Args:
        parts: in order; one that does not use a site has no rows there.
        samples: of each part.
        row_unit: site -> whether rows are samples.
    """

    def rows_of(tables: Sequence[Mapping[str, torch.Tensor]]) -> Iterator[tuple[str, list[torch.Tensor]]]:
        for n in dict.fromkeys(name for table in tables for name in table):
            counts = samples if row_unit[n] else [1] * len(samples)
            candidates = next(table[n] for table in tables if n in table).shape[1:]
            none = [torch.zeros(c, *candidates, dtype=torch.float64) for c in counts]
            yield n, [table.get(n, zeros) for table, zeros in zip(tables, none)]

    rows, forms = (
        [
            {n: torch.cat(p) if row_unit[n] else torch.stack(p).sum(0) for n, p in rows_of(of_probe)}
            for of_probe in zip(*tables)
        ]
        for tables in ([part.rows for part in parts], [part.forms for part in parts])
    )
    return Probes(rows, {n: torch.cat(p) for n, p in rows_of([part.sizes for part in parts])}, forms=forms)


def _lacks_second_derivative(error: RuntimeError) -> bool:
    text = str(error)
    return "derivative" in text or "differentiate" in text or "double backward" in text


@dataclass
class WholeBatches:
    """Steps that take every sample.

    Attributes:
        runner: how a batch is probed.
        data: all batches.
        probes_per_step: random vectors.
        work: samples that a step sends back, as a share of all.
        report_every: steps after which the progress bar shows the error.
    """

    runner: ProbeRunner
    data: BatchSet
    work: float = field(default=1.0, init=False)
    report_every: int = field(default=1, init=False)
    _heap: Heap = field(default_factory=Heap, init=False)

    @property
    def probes_per_step(self) -> int:
        """Random vectors that every sample gets in a step."""
        return self.runner.estimator.probes_per_step

    def step(self, number: int, statistics: TraceStatistics, first: int, after: Callable[[int], None]) -> None:
        """Add one step's rows of this process's batches to ``statistics``.

        Args:
            number: of the step.
            statistics: gets the rows.
            first: batches of the step that are there already.
            after: called after every batch with the number of those that are there.
        """
        for done, b in enumerate(self.data.local):
            if done >= first:
                self.probe_batch(b, number, statistics)
                self._heap.tidy()
                after(done + 1)

    def probe_batch(self, batch: int, step: int, statistics: TraceStatistics) -> None:
        """Add one step's rows of one batch, by its number."""
        probes = self.runner.probe(self.data.batches[batch], self.data.samples[batch], batch, step)
        for i, rows in enumerate(probes.rows):
            statistics.add(batch, rows, probes.forms[i] if probes.forms else {})
        for site, size in probes.sizes.items():
            statistics.size[site][statistics.place(site, batch)] = size

    def record(self, probes: int) -> dict[str, object]:
        """For the result's settings."""
        return {"draw": "all"}
