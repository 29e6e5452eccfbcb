"""Widths of activations: step and zero point, perturbation ||Q(a) - a||^2, and Omega by sample (section 2.2)."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import nn
from torch.autograd.graph import Node

from hawq_lightning._attention_calls import operands_of
from hawq_lightning._batches import plain_tensor
from hawq_lightning._config import QuantizerConfig, check_bits
from hawq_lightning._errors import HawqError
from hawq_lightning._loss_graph import graph_alone, graph_behind, nodes_of
from hawq_lightning._plan import Candidate
from hawq_lightning._progress import progress_bar
from hawq_lightning._site_table import Site, SiteTable
from hawq_lightning._sites import quantizable_layers
from hawq_lightning._types import Batch, BatchSizeFn, LossFn
from hawq_lightning.layers import OperandReader, WeightReader
from hawq_lightning.quantization._inputs import network_inputs
from hawq_lightning.quantization._quantizers import ActivationQuantizer
from hawq_lightning.quantization._registry import QuantizerSpec
from hawq_lightning.sensitivity import InputHooks, OnDevice, Sensitivity, batches_digest, isolated_eval, repeatable

_OTHERS = (
    "The traces were measured on other batches than these, so Ω of activations is mean trace times mean perturbation, "
    "and not paired by sample. A DataLoader that shuffles gives others every time: give both list(loader), made once."
)
_Look = Callable[[str, torch.Tensor], Callable[[bool], None]]
# Layers round once more what lies on the grid of a result. Steps of least squared error are ratios of small integers:
# codes would lie in the middle between two, where float rounding decides, in every runtime otherwise.
_APART = 1.00291237
_SAMPLE_A_BATCH = 16_384  # values of each activation site: enough for the clipping range, small beside the batch


def activation_candidates(
    model: nn.Module,
    batches: OnDevice,
    sensitivity: Sensitivity,
    mean_traces: Mapping[str, float],
    sites: SiteTable,
    loss_fn: LossFn,
    config: QuantizerConfig,
    spec: QuantizerSpec,
    batch_size_fn: BatchSizeFn,
    progress: bool,
) -> dict[str, tuple[Candidate, ...]]:
    """Every width of every activation site, by two passes over the batches: ranges, then what rounding changes.

    Args:
        model: left as it was.
        batches: those that the traces were measured on.
        sensitivity: traces by row.
        mean_traces: site -> mean trace that counts, see :func:`guarded_mean_traces`.
        sites: table of the model.
        loss_fn: runs the model on a batch.
        config: widths.
        spec: the quantizer.
        batch_size_fn: number of samples in a batch.
        progress: show bars.

    Raises:
        HawqError: a site that no batch uses, or one that reads NaN.
    """
    if not len(batches):
        raise HawqError(
            "No batches to weigh activations on: the iterable is empty, or was read before, as a generator is."
        )
    run = _Runs(model, batches, loss_fn, sites, progress)
    with isolated_eval(model):
        steps = _calibrated(run, sites, config, spec)
        rows = _Perturbations(steps, batches.samples(batch_size_fn), sensitivity.row_unit, spec.activation_quantizer())
        run.all("Activation perturbations", rows.visit)
    rows.paired = not sensitivity.data or sensitivity.data == batches_digest(batches.kept)
    if not rows.paired and any(rows.as_many(s.name, sensitivity) for s in sites.activations):
        warnings.warn(_OTHERS, stacklevel=3)
    found = {}
    for site in sites.activations:
        lift = _lift(sensitivity, site.name, mean_traces[site.name])
        found[site.name] = tuple(
            Candidate(bits, rows.code, *rows.omega(site.name, bits, sensitivity, lift), scale=step, zero_point=zero)
            for bits, (step, zero) in steps[site.name].items()
        )
    return found


def _calibrated(
    run: _Runs, sites: SiteTable, config: QuantizerConfig, spec: QuantizerSpec
) -> dict[str, dict[int, tuple[float, int]]]:
    """Site -> bits -> (step, zero point)."""
    assert config.activation_bits is not None
    widths = check_bits(config.activation_bits, "activation")
    at_input = None if config.input_bits is None else check_bits(config.input_bits, "activation")
    inputs = frozenset() if at_input is None else network_inputs(run.model, run.batches[0], run.loss_fn, sites)
    ranges = _Ranges(spec)
    run.all("Activation ranges", lambda batch: ranges.look)

    def offered(site: Site) -> tuple[int, ...]:
        if site.fixed_bits is not None:
            return (site.fixed_bits,)
        return at_input if at_input and site.name in inputs else widths

    def grid(site: Site, bits: int) -> tuple[float, int]:
        step, zero = ranges.step(site.name, bits)
        return (step if site.fixed_bits is None else step * _APART), zero

    return {s.name: {bits: grid(s, bits) for bits in offered(s)} for s in sites.activations}


class _Runs:
    """Runs of the model over batches, in which visitors see what activation sites read."""

    def __init__(self, model: nn.Module, batches: OnDevice, loss_fn: LossFn, sites: SiteTable, progress: bool) -> None:
        self.model, self.batches, self._progress = model, batches, progress
        self.loss_fn = repeatable(model, loss_fn)
        layers, _ = quantizable_layers(model)
        self._readers: dict[str, nn.Module | WeightReader | OperandReader] = {
            **{x.name: layers[x.name] for x in sites.layers},
            **operands_of(model, sites),
        }
        self._site_of = sites.reads

    def all(self, what: str, visitor: Callable[[int], _Look]) -> None:
        """Every batch once.

        Args:
            what: the bar's text.
            visitor: gives for a batch what looks at site and tensor; what that returns is told afterwards whether the
                loss's gradient comes by the tensor, or the pass was one of a teacher.
        """
        with progress_bar(what, len(self.batches), self._progress) as advance:
            for b, batch in enumerate(self.batches):
                seen, loss = graph_alone(lambda: self._one(batch, visitor(b)))  # noqa: B023
                graph = graph_behind(loss)
                for nodes, tell in seen:
                    tell(not graph or not graph.isdisjoint(nodes))
                advance(b + 1)

    def _one(self, batch: Batch, look: _Look) -> tuple[list[tuple[list[Node], Callable[[bool], None]]], torch.Tensor]:
        seen: list[tuple[list[Node], Callable[[bool], None]]] = []

        def visit(site: str, x: torch.Tensor) -> torch.Tensor:
            read = x if not torch.is_grad_enabled() else x.view_as(x) if x.requires_grad else _leaf(x)
            seen.append((nodes_of(read)[:1], look(site, plain_tensor(x.detach()))))
            return read

        with InputHooks(self._readers, self._site_of, visit), torch.enable_grad():  # a step may want x.grad
            return seen, self.loss_fn(self.model, batch)


def _leaf(x: torch.Tensor) -> torch.Tensor:
    return x if x.is_inference() else x.detach().requires_grad_(True)


def _lift(sensitivity: Sensitivity, name: str, guarded: float) -> float | None:
    """``None`` if the measured rows stand; else the mean trace that takes their place."""
    return None if guarded == sensitivity[name].mean_trace else guarded


class _Ranges:
    """Extremes and a strided sample of what each site reads: on the way to the loss, or else anywhere."""

    def __init__(self, spec: QuantizerSpec) -> None:
        self._quantizer = spec.activation_quantizer()
        self._seen: dict[tuple[str, bool], list[tuple[float, float, torch.Tensor]]] = {}

    def look(self, site: str, x: torch.Tensor) -> Callable[[bool], None]:
        """Note a tensor."""
        if not x.numel():  # a head for objects, in a batch without any
            return lambda in_graph: None
        low, high = (float(v) for v in torch.aminmax(x))
        flat = x.flatten()
        stride = max(1, -(-flat.numel() // _SAMPLE_A_BATCH))
        # an odd stride does not beat with the row length of the images
        sample = flat[:: stride | 1].float().cpu()
        return lambda in_graph: self._seen.setdefault((site, in_graph), []).append((low, high, sample))

    def step(self, site: str, bits: int) -> tuple[float, int]:
        """Step and zero point for a width.

        Raises:
            HawqError: no batch reaches the site, or what it reads holds NaN.
        """
        seen = self._seen.get((site, True)) or self._seen.get((site, False))
        if not seen:
            raise HawqError(f"Site {site!r} reads nothing in any of these batches: give one that uses it.")
        lows, highs, samples = zip(*seen)
        odd = [v for v in (*lows, *highs) if v != v]
        low, high = (odd[0], odd[0]) if odd else (min(lows), max(highs))
        try:
            return self._quantizer.calibrate(torch.cat(samples), low, high, bits)
        except HawqError as error:
            raise HawqError(f"Site {site!r}: {error}.") from None


class _Perturbations:
    """||Q(a_n) - a_n||^2 for every row and width, rows as in the sensitivity; 0 where a batch does not use a site.

    Attributes:
        paired: whether the rows are of the samples that the sensitivity has traces of.
    """

    def __init__(
        self,
        steps: Mapping[str, Mapping[int, tuple[float, int]]],
        samples: Sequence[int],
        unit: Mapping[str, str],
        quantizer: ActivationQuantizer,
    ) -> None:
        self._quantizer, self.code, self.paired = quantizer, quantizer.code, True
        self._steps, self._samples, self._unit = steps, samples, unit
        self._rows: dict[tuple[str, int, bool], dict[int, torch.Tensor]] = {}

    def visit(self, batch: int) -> _Look:
        """What looks at the tensors of a batch."""
        samples = self._samples[batch]

        def look(site: str, x: torch.Tensor) -> Callable[[bool], None]:
            x32 = x.float()
            values = []
            for bits, (step, zero) in self._steps[site].items():
                levels = self._quantizer.levels_at(x32, step, zero, bits)
                error = levels.sub_(x32).square_()
                if self._per_sample(site) and len(error) == samples:
                    values.append((bits, error.flatten(1).sum(1).double().cpu()))
                else:
                    values.append((bits, (error.sum().double()[None] / samples).cpu()))

            def tell(in_graph: bool) -> None:
                for bits, value in values:
                    here = self._rows.setdefault((site, bits, in_graph), {})
                    here[batch] = here[batch] + value if batch in here else value

            return tell

        return look

    def _per_sample(self, site: str) -> bool:
        return self._unit.get(site) == "image"

    def _perturbation(self, site: str, bits: int) -> torch.Tensor:
        found = self._rows.get((site, bits, True)) or self._rows.get((site, bits, False)) or {}
        rows = []
        for batch, samples in enumerate(self._samples):
            count = samples if self._per_sample(site) else 1
            rows.append(found.get(batch, torch.zeros((), dtype=torch.float64)).expand(count))
        return torch.cat(rows)

    def as_many(self, site: str, sensitivity: Sensitivity) -> bool:
        """Whether there are as many rows of a site as traces."""
        rows = sum(self._samples) if self._per_sample(site) else len(self._samples)
        return len(sensitivity.rows.get(site, ())) == rows

    def omega(self, site: str, bits: int, sensitivity: Sensitivity, lift: float | None) -> tuple[float, float]:
        """Omega = mean over rows of (trace / size) * perturbation, and the mean perturbation."""
        perturbation = self._perturbation(site, bits)
        paired = self.paired and self.as_many(site, sensitivity)
        weight = torch.as_tensor(sensitivity.row_weights.get(site, [1.0] * len(perturbation)), dtype=torch.float64)
        share = weight / weight.sum()
        mean = float((share * perturbation).sum())
        trace = torch.as_tensor(sensitivity.rows.get(site, ()), dtype=torch.float64)
        size = torch.as_tensor(sensitivity.sizes.get(site, ()), dtype=torch.float64)
        if lift is not None or not paired:
            return (sensitivity[site].mean_trace if lift is None else lift) * mean, mean
        omega = float((share * trace / size.clamp_min(1) * perturbation).sum())
        if math.isnan(omega):  # which max would take for 0, and the site would get the fewest bits
            raise HawqError(f"Omega of site {site!r} at {bits} bits is not a number; measure it again, or exclude it.")
        return max(0.0, omega), mean
