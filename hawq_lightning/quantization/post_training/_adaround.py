"""AdaRound-style rounding: layer by layer, up or down as keeps the layer's outputs, in the order of the network."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import nn

from hawq_lightning._batches import default_forward
from hawq_lightning._progress import progress_bar
from hawq_lightning._types import Batch
from hawq_lightning.quantization._modules import QuantizedWeight
from hawq_lightning.quantization.post_training._reference import (
    FloatReference,
    Forward,
    calls_in_order,
    look_at,
    prepared,
    still,
)
from hawq_lightning.quantization.post_training._rounding import learn_rounding
from hawq_lightning.quantization.post_training._second_moments import Moments

_POSITIONS = 32_768  # a call, about


def adaround(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    forward: Forward = default_forward,
    reference: FloatReference | None = None,
    ridge: float = 0.01,
    progress: bool = False,
) -> dict[str, dict[str, float]]:
    """Choose for every weight the code below or above it, layer by layer, so that outputs stay those of the float net.

    Each layer sees what the quantized layers before it give (Nagel et al., 2020, section 4.1: asymmetric
    reconstruction) and is held against the float layer on the float input. Steps and bits stay; no code is more than
    one from the nearest. The weights are moved onto the learned grid points, so fake-quantization, checkpoints and
    packed files hold the learned codes without knowing of it.

    Args:
        model: with quantizers enabled; its weights are changed in place.
        batches: a few hundred images; labels are not used unless ``forward`` does.
        forward: runs the model on a batch.
        reference: the float network; default: the model's own present weights.
        ridge: how much the distance from the weights themselves counts, as a share of the inputs' mean square; keeps
            rounding from fitting the sample.
        progress: show a bar.

    Returns:
        layer -> ``moved`` (share of codes that are not the nearest), ``before`` and ``after`` (mean squared output
        error of the nearest and of the learned codes, over the mean square of the float outputs). Layers that were left
        alone do not appear: transposed convolutions, weights that several layers share, and quantizers whose levels are
        no even grid.

    Raises:
        HawqError: no quantizer is enabled, or no batches.
    """
    layers, calibration = prepared(model, batches)
    reference = reference or FloatReference(model)
    report: dict[str, dict[str, float]] = {}
    with still(model):
        order = calls_in_order(model, layers, calibration[0], forward)
        with progress_bar("Rounding", len(order), progress) as advance:
            for done, (name, calls) in enumerate(order.items()):
                layer = layers[name]
                if on_even_grid(layer) and not shared(layer, model):
                    moments = _moments(model, layer, calls, calibration, forward, reference)
                    report[name] = _round(layer, moments, ridge)
                advance(done + 1)
    return report


def _moments(
    model: nn.Module,
    layer: QuantizedWeight,
    calls: int,
    batches: Sequence[Batch],
    forward: Forward,
    reference: FloatReference,
) -> Moments:
    moments = Moments(_rows(layer))
    for batch in batches:
        floating: list[torch.Tensor] = []

        def keep(x: torch.Tensor, _: torch.Tensor, into: list[torch.Tensor] = floating) -> None:
            into.append(_patches(layer, x))

        def add(x: torch.Tensor, _: torch.Tensor, rest: list[torch.Tensor] = floating) -> None:
            moments.add(rest.pop(0), _patches(layer, layer.input_quantizer(x)))

        with reference.in_place():
            look_at(model, layer, calls, batch, forward, keep)
        look_at(model, layer, calls, batch, forward, add)
    return moments


def _patches(layer: QuantizedWeight, x: torch.Tensor) -> torch.Tensor:
    return layer.kind.patches(layer.module, x, _POSITIONS)


def _rows(layer: QuantizedWeight) -> torch.Tensor:
    return layer.weight.detach().float().reshape(layer.kind.groups(layer.module), -1, layer.weight[0].numel())


def _round(layer: QuantizedWeight, moments: Moments, ridge: float) -> dict[str, float]:
    quantizer, rows = layer.weight_quantizer, _rows(layer)
    gram, mixed, power = moments.mean()
    half, zero = 1 << (quantizer.bits - 1), float(quantizer.zero_point)
    steps = quantizer.scale.detach().expand(layer.weight.shape[0]).reshape(rows.shape[:2])
    nearest = quantizer.codes(layer.weight).reshape(rows.shape)
    codes, after, before = [], 0.0, 0.0
    for g in range(len(rows)):
        damp = ridge * gram[g].diagonal().mean().clamp_min(1e-30) * torch.eye(len(gram[g]), device=gram.device)
        best, *_ = learn_rounding(rows[g], steps[g], -half, half - 1, zero, gram[g] + damp, mixed[g] + damp)
        codes.append(best)
        after += _error(best, steps[g], zero, rows[g], gram[g], mixed[g], power[g])
        before += _error(nearest[g], steps[g], zero, rows[g], gram[g], mixed[g], power[g])
    learned = torch.stack(codes)
    layer.weight.copy_(quantizer.dequantize(learned.reshape(layer.weight.shape)).to(layer.weight.dtype))
    total = float(power.sum())
    return {
        "moved": float((learned != nearest).float().mean()),
        "before": before / total if total > 0 else 0.0,
        "after": after / total if total > 0 else 0.0,
    }


def _error(
    codes: torch.Tensor, step: torch.Tensor, zero: float, rows: torch.Tensor, gram: torch.Tensor, mixed: torch.Tensor,
    power: torch.Tensor,
) -> float:  # fmt: skip
    v = (codes.float() - zero) * step[:, None]
    return float(((v @ gram - 2 * rows @ mixed) * v).sum() + power.sum())


def on_even_grid(layer: QuantizedWeight) -> bool:
    """Whether codes can be chosen freely: a weight put on any grid point is quantized to that very point."""
    quantizer = layer.weight_quantizer
    if (
        layer.recomputed
        or not quantizer.bits
        or quantizer.code not in ("affine", "midrise")
        or not layer.kind.reconstructs
    ):
        return False
    half = 1 << (quantizer.bits - 1)
    codes = (
        torch.arange(layer.weight.numel(), device=layer.weight.device).reshape(layer.weight.shape) % (2 * half) - half
    )
    points = quantizer.dequantize(codes)
    return torch.equal(quantizer.codes(points), codes.to(torch.int32))


def shared(layer: QuantizedWeight, model: nn.Module) -> bool:
    return sum(p is layer.weight for m in model.modules() for p in m._parameters.values()) > 1
