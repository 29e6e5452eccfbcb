"""Ranges: per channel for weights, per tensor for activations; by least squared error, by extremes or percentiles."""

from __future__ import annotations

from typing import Literal, get_args

import torch

from hawq_lightning._errors import HawqError
from hawq_lightning.quantization._fake_quantize import MIDRISE_ZERO

Ranges = Literal["mse", "minmax", "percentile"]
"""How the clipping range is chosen: least squared error, the extremes, or all but the outermost values."""
RANGES: tuple[Ranges, ...] = get_args(Ranges)
OUTSIDE = 0.001  # the share of values that ``percentile`` leaves beyond a range
TINY = 1e-30  # below it 1/step leaves float32
HUGE = 3.2e38  # float32 ends soon after
_GRID = 24
_SAMPLE = 2048
_SWEEPS = 4


@torch.no_grad()
def weight_step(
    weight: torch.Tensor, bits: int, code: str, axis: int = 0, ranges: Ranges = "mse"
) -> tuple[torch.Tensor, float]:
    """Per-channel steps, by default of least squared error, and their squared error.

    ``mse``: a coarse grid of clipping points on a sample of each channel, then alternating least squares on all of it:
    for given codes the best step is ``<w, v> / <v, v>`` with v the integer levels.

    Args:
        weight: any shape; channels along ``axis``.
        bits: 1 to 8.
        code: ``affine`` or ``midrise``.
        axis: channel axis.
        ranges: ``mse``, ``minmax`` (the largest magnitude is the highest level) or ``percentile``; one bit is always by
            least squares, which makes it sign times mean magnitude.

    Returns:
        steps (float32, one a channel), and ``||Q(W) - W||^2`` of the whole weight.

    Raises:
        HawqError: the weight holds NaN or infinity.
    """
    rows = weight.detach().transpose(0, axis).reshape(weight.shape[axis], -1).to(torch.float32)
    check_finite(rows)
    peak = rows.abs().amax(1).clamp_min(TINY)
    unit = rows / peak[:, None]  # so that huge and denormal channels are alike
    zero = MIDRISE_ZERO if code == "midrise" else 0.0
    half = 1 << (bits - 1)
    ranges = "mse" if bits == 1 else ranges

    def levels(x: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
        return torch.round(x / step[:, None] + zero).clamp_(-half, half - 1) - zero

    def error(x: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
        return (levels(x, step) * step[:, None] - x).square_().sum(1)

    stride = max(1, unit.shape[1] // _SAMPLE)
    sample = unit[:, ::stride]
    top = half - 1 - zero if half > 1 or zero else 0.5  # the highest level that peak can land on
    best = torch.full_like(peak, 1.0 / top)
    if ranges == "percentile":
        best = _quantile(unit.abs(), 1.0 - OUTSIDE).clamp_min(1e-6) / top
    least = error(sample, best)
    for ratio in torch.linspace(1.0, 0.08, _GRID, dtype=torch.float32)[1:].tolist() if ranges == "mse" else ():
        trial = torch.full_like(peak, ratio / top)
        now = error(sample, trial)
        best = torch.where(now < least, trial, best)
        least = torch.minimum(now, least)
    if ranges == "mse":
        least = error(unit, best)
    for _ in range(_SWEEPS if ranges == "mse" else 0):
        v = levels(unit, best)
        fitted = ((unit * v).sum(1) / v.square().sum(1).clamp_min(TINY)).clamp_min(1e-6)
        now = error(unit, fitted)
        best = torch.where(now < least, fitted, best)
        least = torch.minimum(now, least)
    step = (best * peak).clamp(TINY, HUGE)
    total = (levels(rows, step) * step[:, None] - rows).to(torch.float64).square().sum()
    return step, float(total)


@torch.no_grad()
def activation_step(
    sample: torch.Tensor, low: float, high: float, bits: int, ranges: Ranges = "mse"
) -> tuple[float, int]:
    """Step and zero point for one activation site, by default of least squared error.

    Args:
        sample: values of the activation, flat.
        low: the least value seen.
        high: the greatest value seen.
        bits: 2 to 8.
        ranges: ``mse``, ``minmax`` or ``percentile``.

    Returns:
        step, and the integer that stands for zero (0 when nothing was negative: unsigned).

    Raises:
        HawqError: the values hold NaN or infinity.
    """
    if not (
        torch.isfinite(torch.tensor([low, high], dtype=torch.float32)).all() and bool(torch.isfinite(sample).all())
    ):
        raise HawqError("the activation holds NaN or infinity")
    levels = (1 << bits) - 1
    low, high = min(low, 0.0), max(high, 0.0)
    if high - low <= TINY:
        return 1.0, 0
    x = sample.to(torch.float32)

    def grid(a: float, b: float) -> tuple[float, int]:
        step = max((b - a) / levels, TINY)
        return step, min(levels, max(0, round(-a / step)))

    def error(a: float, b: float) -> float:
        step, zero = grid(a, b)
        codes = torch.round(x / step + zero).clamp_(0, levels)
        return float(((codes - zero) * step - x).square_().sum())

    if ranges == "minmax":
        return grid(low, high)
    if ranges == "percentile":
        ends = [float(_quantile(x[None], q)) for q in (OUTSIDE, 1.0 - OUTSIDE)]
        ends = [min(ends[0], 0.0), max(ends[1], 0.0)]
        return grid(*ends) if ends[1] - ends[0] > TINY else grid(low, high)
    ratios = torch.linspace(1.0, 0.1, 37, dtype=torch.float32).tolist()
    _, ratio = min((error(low * r, high * r), r) for r in ratios)
    a, b = low * ratio, high * ratio
    if low < 0.0:  # the two ends need not shrink alike
        _, a = min((error(low * r, b), low * r) for r in [*ratios, 0.05, 0.0])
        _, b = min((error(a, high * r), high * r) for r in ratios)
        if a == 0.0:
            a = 0.0
    return grid(a, b)


def check_finite(weight: torch.Tensor) -> None:
    """Raise HawqError if a weight holds NaN or infinity."""
    if not bool(torch.isfinite(weight).all()):
        raise HawqError("the weight holds NaN or infinity")


def _quantile(rows: torch.Tensor, q: float) -> torch.Tensor:
    """The value below which a share ``q`` of each row lies (torch.quantile stops at 16 million)."""
    count = rows.shape[1]
    rank = min(count - 1, max(0, round(q * (count - 1))))
    return rows.kthvalue(rank + 1, dim=1).values
