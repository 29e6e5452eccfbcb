"""Moments over probes of every row's trace, and the two standard errors that come from them."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence

import torch

from hawq_lightning._errors import HawqError
from hawq_lightning._plan import Candidate
from hawq_lightning._site_table import SiteTable
from hawq_lightning.sensitivity._form_statistics import FormStatistics
from hawq_lightning.sensitivity._process_shard import ProcessShard
from hawq_lightning.sensitivity._result_fields import SiteTrace
from hawq_lightning.sensitivity._rounding import QuadraticForm


class TraceStatistics:
    """First and second moments over probes, a table of rows for every site.

    A row is a sample where samples can be told apart, otherwise a batch. Its value is the trace of the row's own loss,
    so that the weighted mean over rows is the trace of the site. With x_k the value at probe k of K, all float64:

    - ``mean``: site -> (rows,), the mean of x_k over k;
    - ``m2``: site -> (rows,), the sum of (x_k - mean)^2 (Welford, Technometrics 4, 1962);
    - ``size``: activation site -> (rows,), elements of the activation; 0 until the row was probed;
    - ``weight``: site -> (rows,), of each row in the trace: samples of the batch, or 1 for each sample.

    Args:
        table: the sites.
        samples: number of samples of each batch.
        per_sample: site -> whether its rows are samples.
        candidates: site -> of how many there are quadratic forms; see :attr:`forms`.
    """

    def __init__(
        self,
        table: SiteTable,
        samples: Sequence[int],
        per_sample: Mapping[str, bool],
        candidates: Mapping[str, int] | None = None,
    ) -> None:
        self.table, self.per_sample = table, per_sample
        self._start = [0, *torch.tensor(samples).cumsum(0).tolist()]
        self._samples = list(samples)
        count = {s.name: (self._start[-1] if per_sample[s.name] else len(samples)) for s in table}
        self.mean = {n: torch.zeros(c, dtype=torch.float64) for n, c in count.items()}
        self.m2 = {n: torch.zeros(c, dtype=torch.float64) for n, c in count.items()}
        self.size = {s.name: torch.zeros(count[s.name], dtype=torch.float64) for s in table.activations}
        self.weight = {
            s.name: torch.ones(count[s.name], dtype=torch.float64)
            if per_sample[s.name]
            else torch.tensor(self._samples, dtype=torch.float64)
            for s in table
        }
        self.counts = [0] * len(samples)
        self.probes = 0
        self.forms = FormStatistics(count, candidates or {})

    @property
    def samples(self) -> tuple[int, ...]:
        """Number of samples of each batch."""
        return tuple(self._samples)

    def place(self, site: str, batch: int) -> slice:
        """Where the rows of a batch stand in the table."""
        if self.per_sample[site]:
            return slice(self._start[batch], self._start[batch + 1])
        return slice(batch, batch + 1)

    def add(
        self, batch: int, values: Mapping[str, torch.Tensor], forms: Mapping[str, torch.Tensor] | None = None
    ) -> None:
        """Add one probe of one batch.

        Args:
            batch: its number.
            values: site -> (rows of the batch,), of the batch's loss; of a mean loss each sample has 1/N of its own.
            forms: site -> (rows of the batch, candidates), of the batch's loss.
        """
        self.counts[batch] += 1
        for site, value in values.items():
            place = self.place(site, batch)
            x = value * (self._samples[batch] if self.per_sample[site] else 1.0)
            deviation = x - self.mean[site][place]  # Welford: no cancellation where probes hardly differ
            self.mean[site][place] += deviation / self.counts[batch]
            self.m2[site][place] += deviation * (x - self.mean[site][place])
        for site, value in (forms or {}).items():
            scale = self._samples[batch] if self.per_sample[site] else 1.0
            self.forms.add(site, self.place(site, batch), scale * value, self.counts[batch])

    def fresh(self) -> TraceStatistics:
        """An empty table for the same rows."""
        return TraceStatistics(self.table, self._samples, self.per_sample, self.forms.candidates)

    def summed(self, shard: ProcessShard, probes: int) -> TraceStatistics:
        """Those of all processes (each holds its own batches, zeros elsewhere).

        Args:
            shard: for the sum.
            probes: that every batch has had by now.
        """
        total = copy.copy(self)
        total.probes = probes
        if shard.all_reduce_sum is not None:
            tables = [self.mean, self.m2, self.size]
            flat = torch.cat([t[n] for t in tables for n in t])
            parts = iter(shard.sum(flat).split([t[n].numel() for t in tables for n in t]))
            total.mean, total.m2, total.size = ({n: next(parts) for n in t} for t in tables)
            total.forms = self.forms.summed(shard)
        return total

    def means(self, site: str) -> torch.Tensor:
        """Mean over probes, a row each."""
        return self.mean[site]

    def trace(self, site: str) -> float:
        """Weighted mean over rows."""
        w = self.weight[site]
        return float((w * self.means(site)).sum() / w.sum())

    def stderr(self, site: str) -> float:
        """Against the exact trace on the same images: probe noise alone."""
        if self.probes < 2:
            return math.inf
        return float(self._noise(site).sum().sqrt() / self.weight[site].sum())

    def _noise(self, site: str) -> torch.Tensor:
        """Squared standard errors of the weighted rows."""
        return self.weight[site].square() * self.m2[site] / (self.probes * (self.probes - 1))

    def stderr_data(self, site: str) -> float:
        """With the sampling of the rows added; infinite for a single row."""
        w, mean = self.weight[site], self.means(site)
        rows = len(mean)
        if rows < 2:
            return math.inf
        share = w / w.sum()
        centre = (share * mean).sum()
        variance = (share.square() * (mean - centre).square()).sum() * rows / (rows - 1)
        return max(float(variance.sqrt()), self.stderr(site) if self.probes > 1 else 0.0)

    def degrees_of_freedom(self, site: str) -> float:
        """Degrees of freedom behind :meth:`stderr` (Welch and Satterthwaite: few noisy rows count as few).

        Probes without any spread tell as much as there are of them, since equal values may be luck: z and -z give the
        same, and a quadratic form in random signs that is not constant gives another value with probability 1/4 at
        least. Each counts half, so that 20 degrees of freedom leave a chance of (3/4)^40 = 1e-5.
        """
        if self.probes < 2:
            return 0.0
        noise = self._noise(site)
        total = float(noise.sum())
        if total == 0:
            return 0.5 * (self.probes - 1) * self._live_rows(site)
        return total**2 / float(noise.square().sum()) * (self.probes - 1)

    def _live_rows(self, site: str) -> int:
        """Rows of the site's unit that have a trace at any site; all where none has."""
        unit = self.per_sample[site]
        live = torch.zeros(len(self.mean[site]), dtype=torch.bool)
        for name, mean in self.mean.items():
            if self.per_sample[name] == unit:
                live |= mean != 0
        return int(live.sum()) or len(live)

    def check_finite(self) -> None:
        """Raise HawqError where a row is no number, and name its site."""
        for site, mean in self.mean.items():
            bad = (~torch.isfinite(mean + self.m2[site])).nonzero()
            if len(bad):
                unit = "image" if self.per_sample[site] else "batch"
                raise HawqError(
                    f"The trace of site {site!r} is not finite for {len(bad)} of {len(mean)} rows (the first is {unit} "
                    f"{int(bad[0])}): the loss or the network has no finite derivatives there, such as sqrt or norm at "
                    "0. Exclude the layer, or add a small constant there."
                )
        for site, mean in self.forms.mean.items():
            if not bool(torch.isfinite(mean).all()):
                raise HawqError(f"The quadratic form of the rounding error of site {site!r} is not finite.")

    def filled_sizes(self, site: str) -> torch.Tensor:
        """Elements of each row of an activation site; of rows never probed, whose traces count 0, the others' mean."""
        size = self.size[site]
        probed = size > 0
        return torch.where(probed, size, size[probed].mean()) if bool(probed.any()) else size.clamp_min(1)

    def form_records(
        self, candidates: Mapping[str, Sequence[Candidate]], exact: bool = False
    ) -> dict[str, tuple[QuadraticForm, ...]]:
        """One record a candidate of every site that has quadratic forms.

        Args:
            candidates: site -> those that were measured.
            exact: they have no error.
        """
        out = {}
        for site in self.forms.mean:
            w = self.weight[site]
            stderr = self.forms.stderr(site, w, self.probes)
            data = self.forms.stderr_data(site, w, self.probes)
            value = self.forms.value(site, w)
            stderr = torch.zeros_like(stderr) if exact else stderr
            listed, many = candidates[site], len(candidates[site])
            out[site] = tuple(
                QuadraticForm(
                    c.bits, c.code, c.perturbation, float(value[k]), float(stderr[k]), float(data[k]),
                    *((float(x[many + k]) for x in (value, stderr)) if len(value) > many else ()),
                )
                for k, c in enumerate(listed)
            )  # fmt: skip
        return out

    def records(self, exact: bool = False) -> tuple[SiteTrace, ...]:
        """One record a site."""
        out = []
        for s in self.table:
            trace = self.trace(s.name)
            mean_trace = trace / s.numel
            if s.kind == "activation":
                w = self.weight[s.name]
                per_element = self.means(s.name) / self.size[s.name].clamp_min(1)
                mean_trace = float((w * per_element).sum() / w.sum())
            error = 0.0 if exact else self.stderr(s.name)
            out.append(SiteTrace(s.name, s.kind, trace, error, self.stderr_data(s.name), s.numel, mean_trace))
        return tuple(out)
