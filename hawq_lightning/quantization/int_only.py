"""Integer-arithmetic-only inference (Jacob et al., CVPR 2018): affine ranges by extremes, one a tensor."""

from __future__ import annotations

import torch

from hawq_lightning.errors import HawqError
from hawq_lightning.quantization.quantizers import ActivationQuantizer, WeightQuantizer
from hawq_lightning.quantization.ranges import HUGE, TINY, check_finite
from hawq_lightning.quantization.registry import register


class ActivationEMA(ActivationQuantizer):
    """Extremes that follow those of the training batches by an exponential moving average (section 3.1).

    They start from calibration, which takes the place of the paper's first steps without activation quantization.

    Args:
        ranges: where extremes start from: ``minmax``, ``mse`` or ``percentile``.
        momentum: share of each batch's extremes.
    """

    follows_data = True
    low: torch.Tensor
    high: torch.Tensor

    def __init__(self, *, ranges: str = "minmax", momentum: float = 0.01) -> None:
        super().__init__(ranges=ranges)
        if not 0 < momentum <= 1:
            raise HawqError(f"momentum is {momentum!r}; it is a share, more than 0 and at most 1.")
        self.momentum = momentum
        self.register_buffer("low", torch.zeros(()))
        self.register_buffer("high", torch.zeros(()))

    @torch.no_grad()
    def arm(self, bits: int, scale: torch.Tensor | float, zero_point: float = 0.0) -> None:
        """See :meth:`Quantizer.arm`."""
        super().arm(bits, scale, zero_point)
        self.low.copy_(-self.zero_point * self.scale)
        self.high.copy_(((1 << bits) - 1 - self.zero_point) * self.scale)

    def quantize(self, x: torch.Tensor) -> torch.Tensor:
        """Rounded to the grid; in training the range moves first."""
        if self.training and self.observing and x.numel():
            with torch.no_grad():
                low, high = torch.aminmax(x.detach())
                self.low.lerp_(low.float().clamp(-HUGE, 0.0), self.momentum)
                self.high.lerp_(high.float().clamp(0.0, HUGE), self.momentum)
                scale, zero = nudged(self.low, self.high, 0, (1 << self.bits) - 1)
                self.scale.copy_(scale)
                self.zero_point.copy_(zero)
        return super().quantize(x)


@register("int_only", activation=ActivationEMA)
class WeightIntOnly(WeightQuantizer):
    """One affine range a tensor, from the least weight to the greatest, with a whole zero point (eq. 1, 12 and 13).

    It follows the weights in training. At 8 bits the lowest code is not used, so that products fit the paper's 16-bit
    accumulators (appendix B). The paper is about 8 bits; one bit is sign times scale here. BatchNorm is folded
    when the network is exported, and not while it trains (section 3.2).

    Args:
        channels: length of the channel axis.
        axis: channel axis of the weight.
    """

    zero_points = follows_data = True

    def __init__(self, channels: int, axis: int = 0) -> None:
        super().__init__(channels, axis, ranges="minmax")

    def kinds(self, bits: int) -> tuple[str, ...]:
        """Integers with a zero point; sign times scale at one bit."""
        return ("midrise",) if bits == 1 else ("affine",)

    @torch.no_grad()
    def fit(self, weight: torch.Tensor, bits: int, code: str) -> float:
        """The range of this weight; see :meth:`WeightQuantizer.fit`."""
        if bits == 1:
            return super().fit(weight, bits, code)
        check_finite(weight)
        self.arm(bits, *self._range(weight, bits))
        return float((self(weight.detach()).double() - weight.double()).square().sum())

    def quantize(self, weight: torch.Tensor) -> torch.Tensor:
        """Rounded to the grid; in training the range is the present weights' own."""
        if self.training and self.observing and self.bits > 1:
            with torch.no_grad():
                scale, zero = self._range(weight, self.bits)
                self.scale.copy_(scale)
                self.zero_point.fill_(zero)
        return super().quantize(weight)

    def _range(self, weight: torch.Tensor, bits: int) -> tuple[torch.Tensor, float]:
        half = 1 << (bits - 1)
        lowest = -half + (bits == 8)
        low, high = torch.aminmax(weight.detach().float())
        scale, zero = nudged(low, high, lowest, half - 1)
        return scale.expand(self.scale.shape), float(zero)


def nudged(low: torch.Tensor, high: torch.Tensor, lowest: int, highest: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Step and whole zero point of the range nearest to [low, high] that has zero on its grid (section 3)."""
    low, high = low.clamp_max(0.0), high.clamp_min(0.0)
    levels = highest - lowest
    scale = (high / levels - low / levels).clamp(TINY, HUGE)
    return scale, torch.round(lowest - low / scale).clamp(lowest, highest)
