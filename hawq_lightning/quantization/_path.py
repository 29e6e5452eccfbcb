"""The straight way from the float network to that of a plan: distances on it, and what each site's move adds."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from hawq_lightning._attention_calls import operands_of
from hawq_lightning._candidates import Candidates
from hawq_lightning._plan import Candidate
from hawq_lightning._site_table import SiteTable
from hawq_lightning._sites import quantizable_layers
from hawq_lightning._types import Batch
from hawq_lightning.layers import OperandReader, WeightReader
from hawq_lightning.quantization._float_distance import FloatDistance
from hawq_lightning.quantization._fold import norms_to_fold
from hawq_lightning.quantization._moved_reads import moved
from hawq_lightning.quantization._pieces import product
from hawq_lightning.quantization._registry import quantizer_named
from hawq_lightning.quantization._rounding_errors import ActivationRounding, weight_errors
from hawq_lightning.quantization._tangent import SlopesOfEveryWidth
from hawq_lightning.sensitivity import EffectiveWeights, InputHooks, isolated_eval

Seen = Callable[[str, torch.Tensor | None, torch.Tensor], None]


class _Slopes:
    """Products of the slopes with the errors of their sites, as they arrive."""

    def __init__(self, wanted: set[str], seen: Seen | None) -> None:
        self.attributing, self.along = False, dict[str, float]()
        self.anchor = torch.zeros((), requires_grad=True)
        self.wanted, self.seen = wanted, seen

    def add(self, site: str, along: float) -> None:
        if site in self.wanted:
            self.along[site] = self.along.get(site, 0.0) + along

    def arrived(self, site: str, slope: torch.Tensor, along: float, x: torch.Tensor | None) -> None:
        self.add(site, along)
        if self.seen is not None and site in self.wanted:
            self.seen(site, x, slope)


class Path:
    """The straight way from the float network to that of one plan.

    Args:
        model: float.
        sites: table of the model.
        candidates: of its sites.
        bits: site -> bits, of which the nearest candidate is taken.
        nearest: whether sites whose bits are not quite these have shares as well; they move in any case.
    """

    def __init__(
        self, model: nn.Module, sites: SiteTable, candidates: Candidates, bits: Mapping[str, int], nearest: bool = True
    ) -> None:
        spec = quantizer_named(candidates.quantizer, candidates.quantizer_options)
        layers, norms = quantizable_layers(model)[0], norms_to_fold(model, sites.layers)
        self._device = next((p.device for p in model.parameters()), torch.device("cpu"))
        self.chosen: dict[str, Candidate] = {
            name: min(listed, key=lambda c: (abs(c.bits - bits[name]), -c.bits)) for name, listed in candidates.items()
        }
        self._model, self._spec, self._candidates = model, spec, candidates
        self._wanted = [name for name, c in self.chosen.items() if nearest or c.bits == bits[name]]
        self._weights = {s.name: layers[s.layers[0]] for s in sites.weights if s.name in candidates}
        self._norms = {s.name: norms.get(s.layers[0]) for s in sites.weights}
        self._errors = {
            name: weight_errors(reader, [self.chosen[name]], spec, self._norms.get(name)).whole()[0]
            for name, reader in self._weights.items()
        }
        self._rounding = {
            s.name: ActivationRounding([self.chosen[s.name]], spec, self._device)
            for s in sites.activations
            if s.name in candidates
        }
        self._readers: dict[str, nn.Module | WeightReader | OperandReader] = {
            **{x.name: layers[x.name] for x in sites.layers}, **operands_of(model, sites)
        }  # fmt: skip
        self._site_of = {name: site for name, site in sites.reads.items() if site in self._rounding}

    def shares(
        self, points: Sequence[tuple[float, float]], target: FloatDistance, batches: Sequence[Batch],
        samples: Sequence[int], advance: Callable[[], None] = lambda: None, every: SlopesOfEveryWidth | None = None,
    ) -> tuple[dict[str, float], float]:  # fmt: skip
        """What every site adds, the mean over samples, and the distance at the end where that is one of the points.

        Args:
            points: t and its weight, the weight of t = 0 left out: nothing has a slope there.
            target: what is attributed.
            batches: on the model's device.
            samples: in each batch.
            advance: called after every batch of every point.
            every: is shown the slopes of all sites at its point.
        """
        total, end = dict.fromkeys(self._wanted, 0.0), math.nan
        for t, weight in points:
            distance, looking = 0.0, every if every is not None and every.at == t else None
            with self._moved(t) as offsets, isolated_eval(self._model):
                for batch, count in zip(batches, samples):
                    share = count / sum(samples)
                    seen = None if looking is None else looking.of_batch(share)
                    here, slopes = self._slopes(target, batch, t, offsets, seen)
                    distance += share * here
                    for name, value in slopes.items():
                        if name in total:
                            total[name] += weight * share * value
                    if looking is not None:
                        looking.passed(share, here, slopes)
                    advance()
            end = distance if t == 1 else end
        return total, end

    def every_width(self, at: float) -> SlopesOfEveryWidth:
        """For :meth:`shares`: the slopes of all sites along the errors of all their widths.

        Args:
            at: point of the path, one of those that shares are taken at.
        """
        listed = {name: list({c.bits: c for c in reversed(of)}.values()) for name, of in self._candidates.items()}
        rounding = {name: ActivationRounding(listed[name], self._spec, self._device) for name in self._rounding}
        weights = {name: (reader, self._norms.get(name)) for name, reader in self._weights.items()}
        return SlopesOfEveryWidth(at, listed, weights, rounding, self._spec)

    def distance(self, target: FloatDistance, batches: Sequence[Batch], samples: Sequence[int]) -> float:
        """At the end of the path."""
        slopes = _Slopes(set(), None)  # of what the network differentiates by itself
        with (
            torch.no_grad(),
            self._moved(1.0) as offsets,
            isolated_eval(self._model),
            EffectiveWeights(self._weights, offsets),
            self._reads_moved(1.0, slopes),
        ):
            values = [float(target(self._model, batch)) for batch in batches]
        return sum(v * count for v, count in zip(values, samples)) / sum(samples)

    def _slopes(
        self, target: FloatDistance, batch: Batch, t: float, offsets: Mapping[str, torch.Tensor], seen: Seen | None
    ) -> tuple[float, dict[str, float]]:
        """D at t, and ``< d D / d site, error of the site >`` of the sites that the outputs depend on.

        ``seen`` is told site, what it read (of a weight nothing) and the slope there, of all sites.
        """
        wanted = set(self._wanted if seen is None else self.chosen)
        slopes = _Slopes(wanted, seen)
        with (
            torch.enable_grad(),
            EffectiveWeights(self._weights, offsets) as effective,
            self._reads_moved(t, slopes),
        ):
            weights = {n: reader for n, reader in self._weights.items() if n in wanted}
            for reader in weights.values():
                if not reader.recomputed:
                    reader.weight.requires_grad_(True)
            loss = target(self._model, batch)
            leaves = [slopes.anchor, *(effective[name] for name in weights)]
            slopes.attributing = True
            _, *at_weights = torch.autograd.grad(loss, leaves, allow_unused=True)
        for name, slope in zip(weights, at_weights):
            if slope is not None:
                slopes.arrived(name, slope, product(slope, self._errors[name]), None)
        return float(loss.detach()), slopes.along

    def _reads_moved(self, t: float, slopes: _Slopes) -> InputHooks:
        """Hooks by which what is read is at t; ``slopes`` hear of it where there is a graph."""

        def visit(site: str, x: torch.Tensor) -> torch.Tensor:
            wanted = site in slopes.wanted
            if not torch.is_grad_enabled() or not (x.requires_grad or wanted):
                return self._rounding[site].moved(x, t)[1]
            return moved(x, site, self._rounding[site], t, slopes, slopes.seen is not None and wanted)

        return InputHooks(self._readers, self._site_of, visit)

    @contextmanager
    def _moved(self, t: float) -> Iterator[dict[str, torch.Tensor]]:
        """Inside, weights are at t, and it gives what to add to those that are computed; they are put back exactly."""
        computed = {n for n, reader in self._weights.items() if reader.recomputed}
        plain = {n: self._weights[n].weight.detach() for n in self._weights if n not in computed}
        before = {n: w.clone() for n, w in plain.items()}
        try:
            for n, w in plain.items():
                w.add_(self._errors[n], alpha=t)
            yield {n: t * self._errors[n] for n in computed}
        finally:
            for n, w in plain.items():
                w.copy_(before[n])
