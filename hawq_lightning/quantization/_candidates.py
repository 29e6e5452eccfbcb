"""Every option of every site with its perturbation ||Q(.) - .||^2 and Omega (eq. 10; for activations section 2.2)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from hawq_lightning._batches import batch_images
from hawq_lightning._errors import HawqError
from hawq_lightning._plan import Candidate
from hawq_lightning._progress import Bar, progress_bar
from hawq_lightning._site_table import SiteTable
from hawq_lightning._sites import quantizable_layers
from hawq_lightning.layers import WeightReader
from hawq_lightning.quantization._fake_quantize import fake_quantize_tensor
from hawq_lightning.quantization._fold import norms_to_fold
from hawq_lightning.quantization._inputs import network_inputs
from hawq_lightning.quantization._registry import QuantizerSpec, quantizer_named
from hawq_lightning.quantization._widths import check_bits
from hawq_lightning.sensitivity import InputHooks, Sensitivity, guarded_mean_traces, isolated_eval, to_device

LossFn = Callable[[nn.Module, Any], torch.Tensor]
_SAMPLE_A_BATCH = 16_384


def weight_kinds(bits: int, codes: str = "auto") -> tuple[str, ...]:
    """Code kinds to try at a width: 1 bit is sign times scale; at 2 bits the better of both; integers above.

    Raises:
        HawqError: an unknown kind.
    """
    if codes not in ("auto", "affine", "midrise"):
        raise HawqError(f"codes={codes!r} is unknown; use 'auto', 'affine' or 'midrise'.")
    if bits == 1:
        return ("midrise",)
    if codes != "auto":
        return (codes,)
    return ("affine", "midrise") if bits == 2 else ("affine",)


def weight_options(
    weight: torch.Tensor,
    axis: int,
    widths: Sequence[int],
    mean_trace: float,
    codes: str = "auto",
    quantizer: str | QuantizerSpec = "uniform",
    norm: nn.Module | None = None,
) -> tuple[Candidate, ...]:
    """One option a width for a weight of any shape; Omega is ``mean_trace * ||Q(W) - W||^2``.

    ``norm`` is the BatchNorm behind the layer, for quantizers that fold it while training.

    Raises:
        HawqError: a quantizer without such codes, or NaN in the weight.
    """
    spec = quantizer_named(quantizer)
    q = spec.weight_quantizer(weight.shape[axis], axis).to(weight.device)
    q.fold(norm)
    out = []
    for bits in widths:
        own = q.code_formats(bits)
        kinds = [k for k in weight_kinds(bits, codes) if k in own]
        if not kinds and codes != "auto" and bits > 1:
            raise HawqError(f"Quantizer {spec.name!r} has no {codes} codes of {bits} bits, but {' and '.join(own)}.")
        error, code = min((q.fit(weight, bits, kind), kind) for kind in kinds or own)
        out.append(Candidate(bits, code, mean_trace * error, error))
    return tuple(out)


def options(
    model: nn.Module,
    batches: Iterable[Any],
    sensitivity: Sensitivity,
    sites: SiteTable,
    loss_fn: LossFn,
    *,
    weight_bits: int | Sequence[int] = (2, 4, 8),
    activation_bits: int | Sequence[int] | None = 8,
    input_bits: int | None = 8,
    codes: str = "auto",
    quantizer: str | QuantizerSpec = "uniform",
    batch_size_fn: Callable[[Any], int] = batch_images,
    progress: bool | Bar = False,
) -> dict[str, tuple[Candidate, ...]]:
    """Weigh every width for every site.

    Args:
        model: left as it was.
        batches: those that the traces were measured on: activations' Omega pairs trace and perturbation image by image.
        sensitivity: traces of ``sites``.
        sites: table from :func:`hawq_lightning.sites`.
        loss_fn: runs the model on a batch.
        weight_bits: widths to choose from, 1 to 8.
        activation_bits: likewise 2 to 8; ``None`` leaves activations float.
        input_bits: width of what the network itself reads; ``None``: as other activations.
        codes: ``auto``, ``affine`` or ``midrise`` for weights of 2 bits and more.
        quantizer: registered name, or what :func:`quantizer_named` returned: whose errors are weighed.
        batch_size_fn: number of images in a batch.
        progress: show a bar.

    Returns:
        site name -> options, ascending bits; activation options carry step and zero point.

    Raises:
        HawqError: widths out of range, NaN in weights or activations (it names the site).
    """
    weight_widths = check_bits(weight_bits, "weight")
    spec = quantizer_named(quantizer)
    layers, _ = quantizable_layers(model)
    norms = norms_to_fold(model, sites.layers)
    mean_traces, _ = guarded_mean_traces(sensitivity)
    out: dict[str, tuple[Candidate, ...]] = {}
    bar = progress_bar(bool(progress))
    with bar as shown:
        task = shown.begin("Weight ranges", len(sites.weights))
        for i, site in enumerate(sites.weights):
            layer = layers[site.layers[0]]
            try:
                out[site.name] = weight_options(
                    layer.weight.detach(),
                    layer.channel_axis,
                    weight_widths,
                    mean_traces[site.name],
                    codes,
                    spec,
                    norms.get(site.layers[0]),
                )
            except HawqError as error:
                raise HawqError(f"Layer {site.layers[0]!r}: {error}.") from None
            shown.advance(task, i + 1)
        if activation_bits is None or not sites.activations:
            return out
        widths = check_bits(activation_bits, "activation")
        kept = list(batches)
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        kept = [to_device(b, device) for b in kept]
        readers = {x.name: layers[x.name] for x in sites.layers}
        site_of = {x.name: x.activation for x in sites.layers if x.activation is not None}
        with isolated_eval(model):
            inputs = network_inputs(model, kept[0], loss_fn, sites) if input_bits is not None else frozenset()
            seen = _Seen(spec)
            _read_all(model, kept, loss_fn, readers, site_of, lambda b: seen.look, shown, "Activation ranges")
            steps: dict[str, dict[int, tuple[float, int]]] = {}
            for site in sites.activations:
                mine = check_bits(input_bits, "activation") if site.name in inputs else widths
                steps[site.name] = {bits: seen.step(site.name, bits) for bits in mine}
            rows = _Perturbations(steps, [batch_size_fn(b) for b in kept], sensitivity.row_unit)
            _read_all(model, kept, loss_fn, readers, site_of, rows.visit, shown, "Activation perturbations")
        for site in sites.activations:
            lift = _lift(sensitivity, site.name, mean_traces[site.name])
            out[site.name] = tuple(
                Candidate(bits, "affine", *rows.omega(site.name, bits, sensitivity, lift), scale=step, zero_point=zero)
                for bits, (step, zero) in steps[site.name].items()
            )
    return out


def _lift(sensitivity: Sensitivity, name: str, guarded: float) -> float | None:
    """``None`` if the measured rows stand; else the mean trace that takes their place."""
    return None if guarded == sensitivity[name].mean_trace else guarded


def _read_all(
    model: nn.Module, batches: Sequence[Any], loss_fn: LossFn, layers: Mapping[str, WeightReader],
    site_of: Mapping[str, str], visitor: Callable[[int], Callable[[str, torch.Tensor], None]], bar: Bar, what: str,
) -> None:  # fmt: skip
    task = bar.begin(what, len(batches))
    for b, batch in enumerate(batches):
        look = visitor(b)

        def visit(site: str, x: torch.Tensor, look: Callable[[str, torch.Tensor], None] = look) -> torch.Tensor:
            look(site, x.detach())
            return x

        with InputHooks(layers, site_of, visit), torch.no_grad():
            loss_fn(model, batch)
        bar.advance(task, b + 1)


class _Seen:
    """Extremes and a strided sample of what each site reads."""

    def __init__(self, spec: QuantizerSpec) -> None:
        self._quantizer = spec.activation_quantizer()
        self._low: dict[str, float] = {}
        self._high: dict[str, float] = {}
        self._samples: dict[str, list[torch.Tensor]] = {}

    def look(self, site: str, x: torch.Tensor) -> None:
        if not x.numel():  # a head for objects, in a batch without any
            return
        low, high = (float(v) for v in torch.aminmax(x))
        self._low[site] = min(self._low.get(site, low), low) if low == low else low
        self._high[site] = max(self._high.get(site, high), high) if high == high else high
        flat = x.flatten()
        stride = max(1, -(-flat.numel() // _SAMPLE_A_BATCH))
        # an odd stride does not beat with the row length of the images
        self._samples.setdefault(site, []).append(flat[:: stride | 1].float().cpu())

    def step(self, site: str, bits: int) -> tuple[float, int]:
        try:
            return self._quantizer.calibrate(torch.cat(self._samples[site]), self._low[site], self._high[site], bits)
        except HawqError as error:
            raise HawqError(f"Site {site!r}: {error}.") from None


class _Perturbations:
    """||Q(a_n) - a_n||^2 for every row and width, rows as in the sensitivity."""

    def __init__(
        self, steps: Mapping[str, Mapping[int, tuple[float, int]]], images: Sequence[int], unit: Mapping[str, str]
    ) -> None:
        self._steps, self._images, self._unit = steps, images, unit
        self._rows: dict[tuple[str, int], list[torch.Tensor]] = {}

    def visit(self, batch: int) -> Callable[[str, torch.Tensor], None]:
        images = self._images[batch]
        here: dict[tuple[str, int], torch.Tensor] = {}

        def look(site: str, x: torch.Tensor) -> None:
            for bits, (step, zero) in self._steps[site].items():
                x32 = x.float()
                top = (1 << bits) - 1
                levels = fake_quantize_tensor(x32, torch.tensor(step), torch.tensor(float(zero)), top)
                error = levels.sub_(x32).square_()
                per_image = self._unit.get(site) == "image"
                value = error.flatten(1).sum(1).double() if per_image else error.sum().double()[None] / images
                if (site, bits) in here:
                    here[site, bits] += value.cpu()
                else:
                    here[site, bits] = value.cpu()
                    self._rows.setdefault((site, bits), []).append(here[site, bits])

        return look

    def omega(self, site: str, bits: int, sensitivity: Sensitivity, lift: float | None) -> tuple[float, float]:
        """Omega = mean over rows of (trace / size) * perturbation, and the mean perturbation."""
        perturbation = torch.cat(self._rows[site, bits])
        weight = torch.as_tensor(sensitivity.row_weights.get(site, [1.0] * len(perturbation)), dtype=torch.float64)
        share = weight / weight.sum()
        mean = float((share * perturbation).sum())
        trace = torch.as_tensor(sensitivity.rows.get(site, ()), dtype=torch.float64)
        size = torch.as_tensor(sensitivity.sizes.get(site, ()), dtype=torch.float64)
        if lift is not None or len(trace) != len(perturbation):
            return (sensitivity[site].mean_trace if lift is None else lift) * mean, mean
        return max(0.0, float((share * trace / size.clamp_min(1) * perturbation).sum())), mean
