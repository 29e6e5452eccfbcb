"""Moments over probes of every row's trace, and the two standard errors that come from them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch

from hawq_lightning._site_table import SiteTable
from hawq_lightning.sensitivity._result import SiteTrace

AllSum = Callable[[torch.Tensor], torch.Tensor]


class TraceStatistics:
    """First and second moments over probes, a table of rows for every site.

    A row is an image where images can be told apart, otherwise a batch. Its value is the trace of the row's own loss,
    so that the weighted mean over rows is the trace of the site.

    Args:
        table: the sites.
        images: images of each batch.
        per_image: site -> whether its rows are images.
    """

    def __init__(self, table: SiteTable, images: Sequence[int], per_image: Mapping[str, bool]) -> None:
        self.table, self.per_image = table, per_image
        self._start = [0, *torch.tensor(images).cumsum(0).tolist()]
        self._images = list(images)
        count = {s.name: (self._start[-1] if per_image[s.name] else len(images)) for s in table}
        self.mean = {n: torch.zeros(c, dtype=torch.float64) for n, c in count.items()}
        self.spread = {n: torch.zeros(c, dtype=torch.float64) for n, c in count.items()}
        self.size = {s.name: torch.zeros(count[s.name], dtype=torch.float64) for s in table.activations}
        self.weight = {
            s.name: torch.ones(count[s.name], dtype=torch.float64)
            if per_image[s.name]
            else torch.tensor(self._images, dtype=torch.float64)
            for s in table
        }
        self.counts = [0] * len(images)
        self.probes = 0

    def place(self, site: str, batch: int) -> slice:
        """Where the rows of a batch stand in the table."""
        if self.per_image[site]:
            return slice(self._start[batch], self._start[batch + 1])
        return slice(batch, batch + 1)

    def add(self, batch: int, values: Mapping[str, torch.Tensor]) -> None:
        """Add one probe of one batch: squared norms of the batch's loss, a row each."""
        self.counts[batch] += 1
        for site, value in values.items():
            place = self.place(site, batch)
            x = value * (self._images[batch] if self.per_image[site] else 1.0)
            before = x - self.mean[site][place]  # Welford: no cancellation where probes hardly differ
            self.mean[site][place] += before / self.counts[batch]
            self.spread[site][place] += before * (x - self.mean[site][place])

    def fresh(self) -> TraceStatistics:
        """An empty table for the same rows."""
        return TraceStatistics(self.table, self._images, self.per_image)

    def gathered(self, all_reduce_sum: AllSum | None) -> TraceStatistics:
        """A copy summed over processes (each holds its own batches, zeros elsewhere)."""
        out = object.__new__(TraceStatistics)
        out.__dict__ = dict(self.__dict__)
        if all_reduce_sum is not None:
            tables = [self.mean, self.spread, self.size]
            flat = torch.cat([t[n] for t in tables for n in t])
            parts = iter(all_reduce_sum(flat).split([t[n].numel() for t in tables for n in t]))
            out.mean, out.spread, out.size = ({n: next(parts) for n in t} for t in tables)
        return out

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
        return self.weight[site].square() * self.spread[site] / (self.probes * (self.probes - 1))

    def stderr_data(self, site: str) -> float:
        """With the sampling of the rows added; infinite for a single row."""
        w, mean = self.weight[site], self.means(site)
        rows = len(mean)
        if rows < 2:
            return math.inf
        share = w / w.sum()
        centre = (share * mean).sum()
        spread = (share.square() * (mean - centre).square()).sum() * rows / (rows - 1)
        return max(float(spread.sqrt()), self.stderr(site) if self.probes > 1 else 0.0)

    def freedom(self, site: str) -> float:
        """Degrees of freedom behind :meth:`stderr` (Welch and Satterthwaite: few noisy rows count as few)."""
        if self.probes < 2:
            return 0.0
        noise = self._noise(site)
        total = float(noise.sum())
        return math.inf if total == 0 else total**2 / float(noise.square().sum()) * (self.probes - 1)

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
