"""Moments over probes of every row's quadratic forms, one a candidate, and their standard errors."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from hawq_lightning.sensitivity._process_shard import ProcessShard


class FormStatistics:
    """As :class:`TraceStatistics`, for tables ``(rows, candidates)``; rows and their weights are those of the traces.

    Args:
        rows: site -> how many.
        candidates: site -> how many; sites without are left out.
    """

    def __init__(self, rows: Mapping[str, int], candidates: Mapping[str, int]) -> None:
        self._rows = dict(rows)
        self.candidates = {n: c for n, c in candidates.items() if c and n in rows}
        shapes = {n: (rows[n], c) for n, c in self.candidates.items()}
        self.mean = {n: torch.zeros(shape, dtype=torch.float64) for n, shape in shapes.items()}
        self.m2 = {n: torch.zeros(shape, dtype=torch.float64) for n, shape in shapes.items()}

    def fresh(self) -> FormStatistics:
        """An empty table for the same rows."""
        return FormStatistics(self._rows, self.candidates)

    def add(self, site: str, place: slice, x: torch.Tensor, count: int) -> None:
        """Add the values of some rows at their ``count``-th probe."""
        deviation = x - self.mean[site][place]
        self.mean[site][place] += deviation / count
        self.m2[site][place] += deviation * (x - self.mean[site][place])

    def summed(self, shard: ProcessShard) -> FormStatistics:
        """Those of all processes."""
        total = self.fresh()
        names = [(table, n) for table in ("mean", "m2") for n in self.mean]
        tensors = [getattr(self, table)[n] for table, n in names]
        if tensors:
            flat = shard.sum(torch.cat([t.flatten() for t in tensors]))
            for (table, n), part in zip(names, flat.split([t.numel() for t in tensors])):
                getattr(total, table)[n] = part.reshape(self.mean[n].shape)
        return total

    def value(self, site: str, weight: torch.Tensor) -> torch.Tensor:
        """Weighted mean over rows (candidates,)."""
        return (weight[:, None] * self.mean[site]).sum(0) / weight.sum()

    def stderr(self, site: str, weight: torch.Tensor, probes: int) -> torch.Tensor:
        """Against the exact forms on the same images; infinite after a single probe."""
        if probes < 2:
            return torch.full((self.candidates[site],), torch.inf, dtype=torch.float64)
        noise = weight[:, None].square() * self.m2[site] / (probes * (probes - 1))
        return noise.sum(0).sqrt() / weight.sum()

    def stderr_data(self, site: str, weight: torch.Tensor, probes: int) -> torch.Tensor:
        """With the sampling of the rows added; infinite for a single row."""
        mean = self.mean[site]
        rows = len(mean)
        if rows < 2:
            return torch.full((self.candidates[site],), torch.inf, dtype=torch.float64)
        share = (weight / weight.sum())[:, None]
        variance = (share.square() * (mean - (share * mean).sum(0)).square()).sum(0) * rows / (rows - 1)
        by_probes = self.stderr(site, weight, probes)
        return torch.maximum(variance.sqrt(), by_probes.where(by_probes.isfinite(), torch.zeros_like(by_probes)))
