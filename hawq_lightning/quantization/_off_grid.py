"""Weights that left the grids they were given: what merging an adapter or other code wrote after quantization."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping

import torch

from hawq_lightning._errors import some
from hawq_lightning.quantization._fake_quantize import fake_quantize_channels
from hawq_lightning.quantization._modules import QuantizedWeight
from hawq_lightning.quantization._ranges import weight_step

_VALUES = 16384  # of a weight that are looked at
_LOST = 0.8  # share of a weight's energy that its levels lack
_BETTER = 0.5  # what a grid that is fitted anew leaves of that


@torch.no_grad()
def off_grid(weights: Mapping[str, QuantizedWeight]) -> list[str]:
    """Names of layers whose weight is far beyond its grid, or so small that the grid rounds it away.

    Rounding to a fitted grid has about the least squared error, and training leaves it near. A weight counts as off its
    grid where four fifths of its energy are lost, and a grid of the same kind, fitted anew, would lose half of that.

    Args:
        weights: layer name -> weight with its quantizer; those that are off, and quantizers whose levels are no even
            steps of what they read, are left out.
    """
    return [name for name, weight in weights.items() if _is_off(weight)]


def warn_off_grid(weights: Mapping[str, QuantizedWeight]) -> None:
    """Say once, in a warning, which weights are :func:`off_grid`, and what to do."""
    if names := off_grid(weights):
        warnings.warn(_sentence(names), stacklevel=3)


def _sentence(names: Iterable[str]) -> str:
    return (
        f"HAWQ: the weights of {some(sorted(names))} are far off the grids that were fitted to them: code wrote to "
        "them after quantization (merging adapters, merge_and_unload: merge first), or training took large steps. "
        "quantize(model, plan_of(model)), both of hawq_lightning.quantization, fits grids anew."
    )


def _is_off(weight: QuantizedWeight) -> bool:
    quantizer, values = weight.weight_quantizer, weight.weight
    if not quantizer.bits or not quantizer.has_even_grid or quantizer.ranges == "percentile":
        return False  # percentiles leave outliers beyond the grid on purpose
    if type(values) not in (torch.Tensor, torch.nn.Parameter):
        return False
    scale, axis = quantizer.scale.detach(), quantizer.axis
    if values.ndim <= axis or values.shape[axis] != scale.numel() or values.is_meta or not values.numel():
        return False
    rows = values.detach().transpose(0, axis).reshape(values.shape[axis], -1)
    channels = max(1, len(rows) // 128)
    rows, scale = rows[::channels], scale[::channels]
    rows = rows[:, :: max(1, rows.numel() // _VALUES)].float()

    half = 1 << (quantizer.bits - 1)
    now = float((fake_quantize_channels(rows, scale, quantizer.zero_point, 0, half) - rows).square().sum())
    if not _LOST * float(rows.square().sum()) < now < float("inf"):
        return False
    return weight_step(rows, quantizer.bits, quantizer.code, 0, quantizer.ranges)[1] < _BETTER * now
