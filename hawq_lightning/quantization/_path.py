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
from hawq_lightning.quantization._registry import quantizer_named
from hawq_lightning.quantization._rounding_errors import ActivationRounding, weight_errors
from hawq_lightning.quantization._tangent import SlopesOfEveryWidth, product
from hawq_lightning.sensitivity import EffectiveWeights, InputHooks, isolated_eval


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

        def visit(site: str, x: torch.Tensor) -> torch.Tensor:
            (error,) = self._rounding[site](x)
            return error.add_(x)

        with (
            torch.no_grad(),
            self._moved(1.0) as offsets,
            isolated_eval(self._model),
            EffectiveWeights(self._weights, offsets),
            InputHooks(self._readers, self._site_of, visit),
        ):
            values = [float(target(self._model, batch)) for batch in batches]
        return sum(v * count for v, count in zip(values, samples)) / sum(samples)

    def _slopes(
        self, target: FloatDistance, batch: Batch, t: float, offsets: Mapping[str, torch.Tensor],
        seen: Callable[[str, torch.Tensor | None, torch.Tensor], None] | None,
    ) -> tuple[float, dict[str, float]]:  # fmt: skip
        """D at t, and ``< d D / d site, error of the site >`` of the sites that the outputs depend on.

        ``seen`` is told site, what it read (of a weight nothing) and the slope there, of all sites.
        """
        out: dict[str, float] = {}
        leaves: list[tuple[str, torch.Tensor, torch.Tensor, torch.Tensor | None]] = []
        wanted = set(self._wanted if seen is None else self.chosen)

        def add(name: str, slope: torch.Tensor, error: torch.Tensor, x: torch.Tensor | None) -> None:
            out[name] = out.get(name, 0.0) + product(slope, error)
            if seen is not None:
                seen(name, x, slope)

        def through(site: str, slope: torch.Tensor, error: torch.Tensor, x: torch.Tensor | None) -> torch.Tensor:
            """The slope at what was read before its error came to it.

            Rounding follows what it rounds, on average, so that the error stays when errors before it move x. Where x
            is clipped the level stays, and the error takes back t of every move.
            """
            if site in wanted:
                add(site, slope, error, x)
            with torch.no_grad():
                return torch.addcmul(slope, slope, self._rounding[site].clipped(error, x), value=-t)

        def visit(site: str, x: torch.Tensor) -> torch.Tensor:
            plain = x.detach()
            with torch.no_grad():
                (error,) = self._rounding[site](plain)
            read = torch.add(x, error, alpha=t)
            if torch.is_grad_enabled() and read.requires_grad:
                # multiplied as it arrives, and neither is kept: memory that is used again needs no new pages
                needed = self._rounding[site].clips_by_input(x.dtype) or (seen is not None and site in wanted)
                held = [(error, plain if needed else None)]
                read.register_hook(lambda slope: through(site, slope, *held.pop()))
            elif torch.is_grad_enabled() and site in wanted:
                leaves.append((site, read.requires_grad_(True), error, plain))
            return read

        with (
            torch.enable_grad(),
            EffectiveWeights(self._weights, offsets) as effective,
            InputHooks(self._readers, self._site_of, visit),
        ):
            weights = {n: reader for n, reader in self._weights.items() if n in wanted}
            for reader in weights.values():
                if not reader.recomputed:
                    reader.weight.requires_grad_(True)
            loss = target(self._model, batch)
            leaves += [(name, effective[name], self._errors[name], None) for name in weights]
            slopes = torch.autograd.grad(loss, [leaf for _, leaf, *_ in leaves], allow_unused=True)
        for (name, _, error, x), slope in zip(leaves, slopes):
            if slope is not None:
                add(name, slope, error, x)
        return float(loss.detach()), out

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
