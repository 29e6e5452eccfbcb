"""What the quantizers of every candidate change: Q_w(W) - W of weights, Q_w(a) - a of activations as they are read.

Errors of weights are made from the weight whenever a layer is reached: those of five widths would take five times its
memory, and to read so much takes as long as to round again what is in the cache.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

import torch
from torch import nn

from hawq_lightning._candidates import Candidates
from hawq_lightning._errors import HawqError
from hawq_lightning._plan import Candidate
from hawq_lightning._site_table import SiteTable
from hawq_lightning._sites import quantizable_layers
from hawq_lightning._types import Batch, LossFn
from hawq_lightning.layers import Directions, KeptDirections, Rows, WeightReader, renew_weight
from hawq_lightning.quantization._fake_quantize import even_channel_levels, even_levels, per_channel_view
from hawq_lightning.quantization._fold import norms_to_fold
from hawq_lightning.quantization._pieces import pieces, product
from hawq_lightning.quantization._quantizers import ActivationQuantizer, WeightQuantizer
from hawq_lightning.quantization._registry import QuantizerSpec, quantizer_named
from hawq_lightning.quantization._renormalised import renormalised
from hawq_lightning.sensitivity import RoundingErrors


@torch.no_grad()
def rounding_errors(
    model: nn.Module,
    candidates: Candidates,
    sites: SiteTable,
    batches: Sequence[Batch] = (),
    loss_fn: LossFn | None = None,
) -> RoundingErrors:
    """The real rounding error of every candidate, for ``measure(..., rounding=)``.

    Args:
        model: whose weights are rounded; left as it was. They must not change while the errors are in use.
        candidates: from :func:`hawq_lightning.candidates`; traces are not needed for them.
        sites: table of the model.
        batches: by which BatchNorm is measured again: then there are the errors that it leaves, too.
        loss_fn: runs the model on a batch.

    Raises:
        HawqError: candidates of a site that the model does not have.
    """
    spec = quantizer_named(candidates.quantizer, candidates.quantizer_options)
    if missing := [n for n in candidates if n not in {s.name for s in sites}]:
        raise HawqError(f"There are candidates for {missing[0]!r}, which is no site of this model.")
    layers, _ = quantizable_layers(model)
    norms = norms_to_fold(model, sites.layers)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    weights: dict[str, Directions] = {
        s.name: weight_errors(layers[s.layers[0]], candidates[s.name], spec, norms.get(s.layers[0]))
        for s in sites.weights
        if s.name in candidates
    }
    activations = {
        s.name: ActivationRounding(candidates[s.name], spec, device) for s in sites.activations if s.name in candidates
    }
    key = _key(candidates)
    offsets: dict[str, torch.Tensor] = {}
    if batches and loss_fn is not None:
        own = {
            s.name: (layers[s.layers[0]], norms[s.layers[0]])
            for s in sites.weights
            if s.name in weights and s.layers[0] in norms
        }
        for name, (left, added) in renormalised(model, batches, loss_fn, own, weights).items():
            weights[name] = left
            offsets[name] = torch.cat([torch.zeros_like(added), added])
        key += " and BatchNorm"
    return RoundingErrors(candidates.by_site, weights, activations, key, offsets)


def weight_errors(
    layer: WeightReader, candidates: Sequence[Candidate], spec: QuantizerSpec, norm: nn.Module | None = None
) -> Directions:
    """``Q_w(W) - W`` of every candidate.

    Args:
        layer: that reads the weight.
        candidates: of its site.
        spec: the quantizer.
        norm: the BatchNorm behind the layer, for quantizers that fold it while training.
    """
    renew_weight(layer.module)
    weight, axis = layer.weight.detach(), layer.channel_axis
    quantizers = []
    for c in candidates:
        quantizer = spec.weight_quantizer(weight.shape[axis], axis).to(weight.device)
        quantizer.fold(norm)
        quantizer.fit(weight, c.bits, c.code)
        quantizers.append(quantizer)
    if all(type(q).quantize is WeightQuantizer.quantize for q in quantizers):
        return WeightRounding(weight, axis, quantizers)
    return KeptDirections(torch.stack([q.eval_weight(weight.float()).to(weight.dtype) - weight for q in quantizers]))


class WeightRounding(Directions):
    """``Q_w(W) - W`` of even grids, a step a channel.

    Args:
        weight: float.
        axis: channel axis.
        quantizers: switched on, one a candidate.
    """

    def __init__(self, weight: torch.Tensor, axis: int, quantizers: Sequence[WeightQuantizer]) -> None:
        super().__init__(len(quantizers), weight.shape)
        self._weight = weight
        self._grids = [(per_channel_view(q.scale, weight, axis), q.zero, 1 << (q.bits - 1)) for q in quantizers]

    def part(self, axis: int, rows: Rows) -> torch.Tensor:
        """See :meth:`Directions.part`."""
        at = (slice(None),) * axis + (rows,)
        weight = self._weight[at]
        out = weight.new_empty(len(self), *weight.shape)
        for error, (step, zero, half) in zip(out, self._grids):
            step = step[at] if step.shape[axis] > 1 else step
            if weight.dtype == torch.float32:
                even_channel_levels(weight, step, zero, half, error).sub_(weight)
            else:
                levels = even_channel_levels(weight.float(), step, zero, half)
                error.copy_(levels.to(weight.dtype) - weight)
        return out


class ActivationRounding:
    """Makes ``Q_w(a) - a`` of what one site reads, a candidate after the other.

    Args:
        candidates: with their grids.
        spec: the quantizer.
        device: of the model.
    """

    def __init__(self, candidates: Sequence[Candidate], spec: QuantizerSpec, device: torch.device) -> None:
        self._quantizers: list[ActivationQuantizer] = []
        for c in candidates:
            if c.scale is None or c.zero_point is None:
                raise HawqError(f"A candidate of {c.bits} bits of an activation has no grid; weigh it on batches.")
            quantizer = spec.activation_quantizer().to(device).eval()
            quantizer.enable(c.bits, c.scale, c.zero_point)
            self._quantizers.append(quantizer)

    def __call__(self, x: torch.Tensor) -> Iterator[torch.Tensor]:
        """One tensor of ``x``'s shape and type a candidate."""
        even = self._even(x)
        read = x.float() if x.dtype == torch.float64 else x
        for quantizer in self._quantizers:
            levels = (even_levels(read, *_grid(quantizer)) if even else quantizer(read)).to(x.dtype)
            yield levels - x if levels.data_ptr() == x.data_ptr() else levels.sub_(x)

    @torch.no_grad()
    def moved(self, x: torch.Tensor, t: float) -> tuple[torch.Tensor, torch.Tensor]:
        """The error of the first candidate, and ``x + t error``.

        Args:
            x: what the site reads.
            t: 0 to 1.
        """
        if not self._even(x) or x.dtype != torch.float32:
            error = next(self(x))
            return error, torch.add(x, error, alpha=t)
        error, read = torch.empty_like(x), torch.empty_like(x)
        with torch._C.DisableTorchFunction():  # whoever watches the loss has no say here, and takes time
            for plain, off, to in pieces(x, error, read):
                torch.sub(even_levels(plain, *_grid(self._quantizers[0]), out=to), plain, out=off)
                if t != 1:
                    torch.add(plain, off, alpha=t, out=to)
        return error, read

    @torch.no_grad()
    def back(
        self, slope: torch.Tensor, error: torch.Tensor, t: float, x: torch.Tensor | None = None
    ) -> tuple[float, torch.Tensor]:
        """Product of the first candidate's error with a slope at ``x + t error``, and the slope at ``x``.

        Args:
            slope: there.
            error: which may be written over.
            t: 0 to 1.
            x: what the site reads, where :meth:`clips_by_input`.
        """
        if self.clips_by_input(slope.dtype) or slope.dtype != error.dtype:
            along = product(slope, error)
            return along, torch.addcmul(slope, slope, self.clipped(error, x), value=-t)
        along, before, half = 0.0, torch.empty_like(slope), _grid(self._quantizers[0])[0] * _MORE_THAN_HALF
        with torch._C.DisableTorchFunction():
            for there, off, here in pieces(slope, error, before):
                along += product(there, off)
                # the slope where the error is less than half a step, else 0
                torch.ops.aten.hardtanh_backward.grad_input(there, off, -half, half, grad_input=here)
                if t != 1:
                    here.lerp_(there, 1 - t)
        return along, before

    @torch.no_grad()
    def along(self, x: torch.Tensor, slope: torch.Tensor) -> list[float]:
        """Product of the error of every candidate with a slope.

        Args:
            x: what the site reads.
            slope: at it.
        """
        total = [0.0] * len(self._quantizers)
        with torch._C.DisableTorchFunction():
            for plain, there in pieces(x, slope) if self._even(x) else [(x, slope)]:
                for k, error in enumerate(self(plain)):
                    total[k] += product(there, error)
        return total

    def _even(self, x: torch.Tensor) -> bool:
        """Whether :func:`even_levels` gives the levels, of any piece by itself."""
        plain = x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64) and type(x) is torch.Tensor
        return plain and type(self._quantizers[0]).quantize is ActivationQuantizer.quantize

    def clips_by_input(self, dtype: torch.dtype) -> bool:
        """Whether :meth:`clipped` has to know what was read: levels are not even, or 16 bits round them once more.

        Args:
            dtype: of what is read.
        """
        return type(self._quantizers[0]).quantize is not ActivationQuantizer.quantize or dtype.itemsize < 4

    def clipped(self, error: torch.Tensor, x: torch.Tensor | None = None) -> torch.Tensor:
        """1 where the site reads what lies beyond the levels of the first candidate, 0 elsewhere.

        Args:
            error: of the first candidate, which is written over.
            x: what the site reads, where :meth:`clips_by_input`.
        """
        step, low, high = _grid(self._quantizers[0])
        if x is None:
            return error.abs_().gt_(step * _MORE_THAN_HALF)  # what is rounded moves by half a step at most
        beyond = (x < step * (low - 0.5)) | (x > step * (high + 0.5))
        return error.copy_(beyond & (error != 0))  # outliers that keep their value are not clipped


_MORE_THAN_HALF = 0.5001


def _grid(quantizer: ActivationQuantizer) -> tuple[float, int, int]:
    """Step, and least and highest level in steps."""
    zero = round(quantizer.zero)
    return float(quantizer.scale), -zero, (1 << quantizer.bits) - 1 - zero


def _key(candidates: Candidates) -> str:
    """What tells these errors from others of the same weights."""
    lines = [f"{candidates.quantizer} {dict(candidates.quantizer_options)}"]
    for name, listed in candidates.items():
        lines.append(f"{name} {[(c.bits, c.code, c.scale, c.zero_point) for c in listed]}")
    return "rounding " + hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]
