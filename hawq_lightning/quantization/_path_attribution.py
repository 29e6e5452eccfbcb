"""What a whole plan will cost before it is tried: path attribution of the distance to the float network.

On the way from the float network to the one with all sites at w bits, ``W_l + t (Q_w(W_l) - W_l)``, t from 0 to 1, each
site is charged with what its own move adds:

    ``P[l, w] = integral of < d D(t) / d W_l , Q_w(W_l) - W_l > dt``, D(t) the distance of the outputs at t.

This is the Aumann-Shapley value of the site (Aumann and Shapley, Values of Non-Atomic Games, 1974; as integrated
gradients, arXiv:1703.01365, with rounding errors for the difference to the baseline). Sites that compound each other's
errors share what they do together, which quadratic forms of single sites leave out. ``sum_l P[l, w]`` is the distance
of the uniform network at w bits, the check that :class:`Forecast` brings along, and ``sum_l P[l, w_l]`` forecasts a
plan.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import get_args

import torch
from torch import nn

from hawq_lightning._attention_calls import operands_of
from hawq_lightning._batches import batch_images
from hawq_lightning._candidates import Candidates
from hawq_lightning._errors import HawqError, choice, nearest
from hawq_lightning._plan import Candidate
from hawq_lightning._progress import progress_bar
from hawq_lightning._site_table import SiteTable
from hawq_lightning._sites import quantizable_layers
from hawq_lightning._types import Batch, BatchSizeFn, LossFn
from hawq_lightning.layers import OperandReader, WeightReader
from hawq_lightning.quantization._float_distance import FloatDistance
from hawq_lightning.quantization._fold import norms_to_fold
from hawq_lightning.quantization._forecast import After, Forecast, Mode
from hawq_lightning.quantization._registry import quantizer_named
from hawq_lightning.quantization._rounding_errors import ActivationRounding, weight_errors
from hawq_lightning.sensitivity import EffectiveWeights, InputHooks, isolated_eval, on_device

_BY_BATCH: dict[str, bool] = {"quantizing": False, "batchnorm": True}
_GAUSS = math.sqrt(0.15)
_TWO_POINTS = ((0.5 - math.sqrt(1 / 12), 0.5), (0.5 + math.sqrt(1 / 12), 0.5))
_POINTS: dict[str, tuple[tuple[float, float], ...]] = {
    "fast": ((0.5, 1.0),),
    "accurate": ((0.5 - _GAUSS, 5 / 18), (0.5, 8 / 18), (0.5 + _GAUSS, 5 / 18)),
}


def forecast(
    model: nn.Module,
    batches: Sequence[Batch],
    loss_fn: LossFn,
    sites: SiteTable,
    candidates: Candidates,
    *,
    mode: Mode = "fast",
    after: After = "quantizing",
    batch_size_fn: BatchSizeFn = batch_images,
    progress: bool = False,
) -> Forecast:
    """Forecast the distance of any plan to the float network: one to two training steps a batch, width and point.

    Args:
        model: float, or with quantizers off; left as it was.
        batches: of some hundred samples; their labels do not matter.
        loss_fn: runs the model on a batch; tells which outputs count, see :class:`FloatDistance`.
        sites: table of the model.
        candidates: from :func:`hawq_lightning.candidates`; traces are not needed for them.
        mode: ``fast``: one point of the path; ``accurate``: three.
        after: ``quantizing``, or ``batchnorm``: with the statistics of each batch in the place of the running ones.
        batch_size_fn: number of samples in a batch.
        progress: show a bar.

    Raises:
        HawqError: an unknown mode, no candidates, or outputs that cannot be compared.
    """
    choice("mode", mode, get_args(Mode))
    choice("after", after, get_args(After))
    if not candidates:
        raise HawqError("There are no candidates to forecast.")
    target = FloatDistance(model, batches, loss_fn, by_batch=_BY_BATCH[after])
    widths = sorted({c.bits for listed in candidates.values() for c in listed})
    shares: dict[str, dict[int, float]] = {name: {} for name in candidates}
    by_width: dict[int, tuple[float, float]] = {}
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    moved = on_device(batches, device)
    samples = moved.samples(batch_size_fn)
    with progress_bar("Forecast", len(widths) * len(batches), progress) as advance:
        for i, bits in enumerate(widths):
            path = _Path(model, sites, candidates, dict.fromkeys(candidates, bits))
            total: dict[str, float] = dict.fromkeys(candidates, 0.0)
            measured = 0.0
            for b, (batch, count) in enumerate(zip(moved, samples)):
                for t, weight in _POINTS[mode]:
                    for name, value in path.slopes(target, batch, t).items():
                        total[name] += weight * value * count / sum(samples)
                measured += path.distance(target, batch) * count / sum(samples)
                advance(i * len(batches) + b + 1)
            by_width[bits] = math.fsum(total.values()), measured
            for name, value in total.items():
                if path.chosen[name].bits == bits:
                    shares[name][bits] = value
    return Forecast(shares, {b: v[0] for b, v in by_width.items()}, {b: v[1] for b, v in by_width.items()}, mode, after)


def shares_of_plan(
    model: nn.Module,
    batches: Sequence[Batch],
    loss_fn: LossFn,
    sites: SiteTable,
    candidates: Candidates,
    bits: Mapping[str, int],
    *,
    after: After = "quantizing",
    batch_size_fn: BatchSizeFn = batch_images,
) -> dict[str, float]:
    """What each site adds to the distance of one plan: path attribution on the way to that plan, by two Gauss points.

    Their sum is the distance of the plan. The mean of a site's share over random plans of about one size, by width,
    ranks other plans of that size better than :func:`forecast` does at low bits, where a uniform network is far from
    them.

    Args:
        model: float, or with quantizers off; left as it was.
        batches: of some hundred samples; their labels do not matter.
        loss_fn: runs the model on a batch.
        sites: table of the model.
        candidates: from :func:`hawq_lightning.candidates`.
        bits: site -> bits, of every site with candidates; the nearest of these is taken.
        after: ``quantizing``, or ``batchnorm``.
        batch_size_fn: number of samples in a batch.

    Raises:
        HawqError: a site without bits, or outputs that cannot be compared.
    """
    choice("after", after, get_args(After))
    if missing := [n for n in candidates if n not in bits]:
        raise HawqError(f"The plan says nothing of site {missing[0]!r}.{nearest(missing[0], bits)}")
    target = FloatDistance(model, batches, loss_fn, by_batch=_BY_BATCH[after])
    moved = on_device(batches, next((p.device for p in model.parameters()), torch.device("cpu")))
    samples = moved.samples(batch_size_fn)
    path = _Path(model, sites, candidates, bits)
    total = dict.fromkeys(candidates, 0.0)
    for batch, count in zip(moved, samples):
        for t, weight in _TWO_POINTS:
            for name, value in path.slopes(target, batch, t).items():
                total[name] += weight * value * count / sum(samples)
    return total


class _Path:
    """The straight way from the float network to that of one plan."""

    def __init__(self, model: nn.Module, sites: SiteTable, candidates: Candidates, bits: Mapping[str, int]) -> None:
        spec = quantizer_named(candidates.quantizer, candidates.quantizer_options)
        layers, norms = quantizable_layers(model)[0], norms_to_fold(model, sites.layers)
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        self.chosen: dict[str, Candidate] = {
            name: min(listed, key=lambda c: (abs(c.bits - bits[name]), -c.bits)) for name, listed in candidates.items()
        }
        self._model = model
        self._weights = {s.name: layers[s.layers[0]] for s in sites.weights if s.name in candidates}
        self._errors = {
            s.name: weight_errors(layers[s.layers[0]], [self.chosen[s.name]], spec, norms.get(s.layers[0])).whole()[0]
            for s in sites.weights
            if s.name in candidates
        }
        self._rounding = {
            s.name: ActivationRounding([self.chosen[s.name]], spec, device)
            for s in sites.activations
            if s.name in candidates
        }
        self._readers: dict[str, nn.Module | WeightReader | OperandReader] = {
            **{x.name: layers[x.name] for x in sites.layers}, **operands_of(model, sites)
        }  # fmt: skip
        self._site_of = {name: site for name, site in sites.reads.items() if site in self._rounding}

    def slopes(self, target: FloatDistance, batch: Batch, t: float) -> dict[str, float]:
        """``< d D / d site, error of the site >`` at t, of the sites that the outputs depend on."""
        reads: list[tuple[str, torch.Tensor, torch.Tensor]] = []

        def visit(site: str, x: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                (error,) = self._rounding[site](x.detach())
            if not torch.is_grad_enabled():
                return x + t * error
            read = x + t * error if x.requires_grad else (x + t * error).requires_grad_(True)
            reads.append((site, read, error))
            return read

        names = list(self._weights)
        with torch.enable_grad(), self._moved(t) as effective, InputHooks(self._readers, self._site_of, visit):
            loss = target(self._model, batch)
            leaves = [effective[n] for n in names] + [read for _, read, _ in reads]
            slopes = torch.autograd.grad(loss, leaves, allow_unused=True)
        errors = [(n, self._errors[n]) for n in names] + [(site, error) for site, _, error in reads]
        out: dict[str, float] = {}
        for (name, error), slope in zip(errors, slopes):
            if slope is not None:
                out[name] = out.get(name, 0.0) + float((slope.float() * error.float()).sum())
        return out

    @torch.no_grad()
    def distance(self, target: FloatDistance, batch: Batch) -> float:
        """At the end of the path."""

        def visit(site: str, x: torch.Tensor) -> torch.Tensor:
            (error,) = self._rounding[site](x)
            return x + error

        with self._moved(1.0), InputHooks(self._readers, self._site_of, visit):
            return float(target(self._model, batch))

    @contextmanager
    def _moved(self, t: float) -> Iterator[EffectiveWeights]:
        """Inside, weights are at t; afterwards they are exactly what they were."""
        offsets = {n: t * e for n, e in self._errors.items()}
        plain = {n: reader.weight for n, reader in self._weights.items() if not reader.recomputed}
        before = {n: w.detach().clone() for n, w in plain.items()}
        try:
            for n, w in plain.items():
                w.detach().add_(offsets[n])
            with isolated_eval(self._model), EffectiveWeights(self._weights, offsets) as effective:
                for w in plain.values():
                    w.requires_grad_(True)
                yield effective
        finally:
            for n, w in plain.items():
                w.detach().copy_(before[n])
