"""Steps over samples that are drawn by the curvature at their outputs; see :mod:`._sampling` for why and how."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from hawq_lightning._progress import progress_bar
from hawq_lightning.sensitivity._batch_set import BatchSet
from hawq_lightning.sensitivity._chunks import Chunk, chunks
from hawq_lightning.sensitivity._estimator import ProbeRequest, Probes, Rows
from hawq_lightning.sensitivity._heap import Heap
from hawq_lightning.sensitivity._memory import RAN_OUT, RanOut, attempt
from hawq_lightning.sensitivity._probe_runner import ProbeRunner
from hawq_lightning.sensitivity._sampling import SamplingDesign, sampling_design
from hawq_lightning.sensitivity._seeds import derive_seed
from hawq_lightning.sensitivity._statistics import TraceStatistics

_AGREE = 0.05  # share by which a sample's curvature may differ between its batch and a drawn one
_SIGNIFICANT = 1e-3  # of the largest curvature: below it rounding rules


class NotDrawableError(Exception):
    """Samples of this loss cannot be taken out of their batches; the message says why."""


@dataclass
class ImportanceSampler:
    """One step after another of drawn samples; rows of samples that were not drawn get zeros.

    Attributes:
        runner: estimator and seed; every site's rows are samples.
        data: all batches.
        curvature: of the loss at the outputs of each sample, in its batch (all samples,).
        design: how likely each sample is.
        probes_per_step: random vectors that a drawn sample gets.
        report_every: steps after which the progress bar shows the error.
    """

    runner: ProbeRunner
    data: BatchSet
    curvature: torch.Tensor
    design: SamplingDesign
    probes_per_step: int = field(default=1, init=False)
    report_every: int = field(default=8, init=False)
    _reduction: str = field(default="", init=False)
    _forms: dict[int, Rows] = field(default_factory=dict, init=False)
    _heap: Heap = field(default_factory=Heap, init=False)

    def __post_init__(self) -> None:
        self._start = self.data.start
        self._largest = max(self.data.samples)

    @property
    def work(self) -> float:
        """Samples that a step sends back on average, as a share of all."""
        return float(self.design.probability.mean())

    def step(self, number: int, statistics: TraceStatistics, first: int, after: Callable[[int], None]) -> None:
        """Add one step's rows to ``statistics``; what one process cannot draw from, all give up together.

        Args:
            number: of the step.
            statistics: gets the rows.
            first: not used: a step of drawn samples is done as a whole.
            after: not used.

        Raises:
            NotDrawableError: the samples' losses depend on the batch that they are in.
        """
        failed = ""
        try:
            self._step(number, statistics)
        except NotDrawableError as reason:
            failed = str(reason)
        count = self.data.shard.sum(torch.tensor([float(bool(failed))], dtype=torch.float64))
        if float(count):
            raise NotDrawableError(failed or "another process found that losses depend on their batch")

    def record(self, probes: int) -> dict[str, object]:
        """For the result's settings: ``probes`` of each sample on average, and in how many steps."""
        return {"draw": "curvature", "rounds": probes, "probes": round(probes * self.work, 2)}

    def _step(self, number: int, statistics: TraceStatistics) -> None:
        samples, local = self.data.samples, self.data.local
        chosen = []
        for b in local:
            generator = torch.Generator().manual_seed(derive_seed(self.runner.seed, number, b, 0))
            uniform = torch.rand(samples[b], generator=generator, dtype=torch.float64)
            chosen.append((b, (uniform < self._of(b, self.design.probability)).nonzero()[:, 0]))
        rows = {
            b: {s.name: torch.zeros(samples[b], dtype=torch.float64) for s in self.runner.context.table} for b in local
        }
        self._forms = {
            b: {
                n: torch.zeros(samples[b], count, dtype=torch.float64)
                for n, count in statistics.forms.candidates.items()
            }
            for b in local
        }
        try:
            self._probe_all(chosen, number, rows, statistics)
        except LookupError:
            raise NotDrawableError("it is not clear how to take images out of a batch") from None
        for b in local:
            statistics.add(b, rows[b], self._forms[b])

    def _probe_all(
        self, chosen: list[tuple[int, torch.Tensor]], step: int, rows: dict[int, Rows], statistics: TraceStatistics
    ) -> None:
        """Probe the chosen samples, (batch, positions) each, as many at a time as memory holds."""
        work = chunks(self.data.batches.kept, self.data.samples, chosen, self._largest, self.data.batch_size_fn)
        while work:
            chunk = work.pop(0)
            probes = attempt(lambda chunk=chunk: self._probe(chunk, step))  # type: ignore[misc]
            if isinstance(probes, RanOut):
                if chunk.samples < 2:
                    raise probes.error
                self._largest = max(1, chunk.samples // 2)
                note = f": drawn images were measured {self._largest} at a time."
                self.runner.context.diagnostics.replace_warning(RAN_OUT, note)
                self._probe_all(list(chunk.segments), step, rows, statistics)
                continue
            self._scatter(chunk, probes, rows, statistics)
            self._heap.tidy()

    def _probe(self, chunk: Chunk, step: int) -> Probes:
        runner = self.runner
        seeds = [(len(ids), derive_seed(runner.seed, step, b, 1 + int(ids[0]))) for b, ids in chunk.segments]
        batch = self.data.batches.move(chunk.batch)
        request = ProbeRequest(
            batch, chunk.samples, runner.per_sample, seeds, 1, first_probe=step, curvature=True
        )  # fmt: skip
        return runner.estimator.probe(runner.context, request)

    def _scatter(self, chunk: Chunk, probes: Probes, rows: dict[int, Rows], statistics: TraceStatistics) -> None:
        """Put what a chunk gives to the rows of its samples, weighed by one over their probabilities."""
        self._check(chunk, probes)
        at = 0
        for b, ids in chunk.segments:
            segment = slice(at, at + len(ids))
            at += len(ids)
            # rows are of the batch's loss: a mean over fewer samples weighs each of them more
            scale = (chunk.samples / self.data.samples[b]) if self._reduction != "sum" else 1.0
            weight = scale / self._of(b, self.design.probability)[ids]
            for site, value in probes.rows[0].items():
                rows[b][site][ids] = weight * value[segment]
            for site, value in (probes.forms[0] if probes.forms else {}).items():
                self._forms[b][site][ids] = weight[:, None] * value[segment]
            for site, size in probes.sizes.items():
                statistics.size[site][statistics.place(site, b)][ids] = size[segment]  # a slice is a view

    def _check(self, chunk: Chunk, probes: Probes) -> None:
        """Every sample's loss must be what it was in its own batch, but for the mean's 1/N."""
        if probes.curvature is None:
            raise NotDrawableError("the curvature of the loss at the outputs has no closed form")
        before = torch.cat([self._of(b, self.curvature)[ids] for b, ids in chunk.segments])
        size = torch.cat(
            [torch.full((len(ids),), float(self.data.samples[b]), dtype=torch.float32) for b, ids in chunk.segments]
        )
        top = float(self.curvature.max())
        for reduction, now in (("mean", probes.curvature * chunk.samples / size), ("sum", probes.curvature)):
            agree = (now - before).abs() <= _AGREE * before + _SIGNIFICANT * top
            if self._reduction in ("", reduction) and bool(agree.all()):
                if bool((size != chunk.samples).any()):  # else it fits both
                    self._reduction = reduction
                return
        raise NotDrawableError("the loss of an image depends on the batch that it is in")

    def _of(self, batch: int, values: torch.Tensor) -> torch.Tensor:
        """The values (all samples,) that belong to one batch."""
        return values[self._start[batch] : self._start[batch + 1]]


def importance_sampler(runner: ProbeRunner, data: BatchSet, progress: bool) -> ImportanceSampler:
    """Design the drawing of samples by the curvature of all samples' losses.

    Args:
        runner: how a batch is probed.
        data: all batches.
        progress: show a bar.

    Raises:
        NotDrawableError: samples cannot be drawn; all processes find so together.
    """
    if not runner.estimator.can_sample:
        raise NotDrawableError(f"estimator='{runner.estimator.name}' has whole batches as rows")
    if not all(runner.per_sample.values()):
        raise NotDrawableError("images cannot be told apart at every site")
    start, heap = data.start, Heap()
    # the last entry counts processes that cannot draw: all must go the same way
    table = torch.zeros(start[-1] + 1, dtype=torch.float64)
    with progress_bar("Curvature at the outputs", len(data.local), progress) as advance:
        for done, b in enumerate(data.local):
            curvature = None
            if runner.largest is None:  # else a whole batch is too much
                batch = data.batches[b]
                result = attempt(lambda batch=batch: runner.estimator.sample_curvature(runner.context, batch))  # type: ignore[misc]
                curvature = None if isinstance(result, RanOut) else result
            if curvature is None or len(curvature) != data.samples[b]:
                table[-1] += 1
                break
            table[start[b] : start[b + 1]] = curvature
            heap.tidy()
            advance(done + 1)
    table = data.shard.sum(table)
    if float(table[-1]):
        raise NotDrawableError(
            "the curvature of the loss at the outputs has no closed form, or memory ran out with whole batches"
        )
    samples = torch.tensor(list(data.samples))
    # of a sample's own loss: of a mean loss it has 1/N
    weighed = table[:-1] * torch.repeat_interleave(samples, samples)
    return ImportanceSampler(runner, data, table[:-1], sampling_design(weighed))
