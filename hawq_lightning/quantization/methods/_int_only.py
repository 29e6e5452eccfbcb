"""Integer-arithmetic-only inference (Jacob et al., CVPR 2018): affine ranges by extremes, one a tensor."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from hawq_lightning._batchnorm import gain
from hawq_lightning._errors import HawqError
from hawq_lightning._torch_state import transformed
from hawq_lightning.quantization._fake_quantize import per_channel_view
from hawq_lightning.quantization._quantizers import ActivationQuantizer, WeightQuantizer
from hawq_lightning.quantization._ranges import HUGE, TINY, Ranges, check_finite
from hawq_lightning.quantization._registry import register_quantizer


class ActivationEMA(ActivationQuantizer):
    """Extremes that follow those of the training batches by an exponential moving average (section 3.1).

    They start from calibration, which takes the place of the paper's first steps without activation quantization.

    Args:
        ranges: where extremes start from: ``minmax``, ``mse`` or ``percentile``.
        momentum: share of each batch's extremes.
    """

    updates_range = True
    low: torch.Tensor
    high: torch.Tensor

    def __init__(self, *, ranges: Ranges = "minmax", momentum: float = 0.01) -> None:
        super().__init__(ranges=ranges)
        if not 0 < momentum <= 1:
            raise HawqError(f"momentum is {momentum!r}; it is a share, more than 0 and at most 1.")
        self.momentum = momentum
        self.register_buffer("low", torch.zeros((), dtype=torch.float32))
        self.register_buffer("high", torch.zeros((), dtype=torch.float32))

    @torch.no_grad()
    def enable(self, bits: int, scale: torch.Tensor | float, zero_point: float = 0.0) -> None:
        """See :meth:`Quantizer.enable`."""
        super().enable(bits, scale, zero_point)
        self.low.copy_(-self.zero_point * self.scale)
        self.high.copy_(((1 << bits) - 1 - self.zero_point) * self.scale)

    def quantize(self, x: torch.Tensor) -> torch.Tensor:
        """Rounded to the grid; in training the range moves first."""
        if self.training and self.range_updates_enabled and not transformed() and x.numel():
            with torch.no_grad():
                low, high = torch.aminmax(x.detach())
                self.low.lerp_(low.float().clamp(-HUGE, 0.0), self.momentum)
                self.high.lerp_(high.float().clamp(0.0, HUGE), self.momentum)
                scale, zero = nudged(self.low, self.high, 0, (1 << self.bits) - 1)
                self.scale.copy_(scale)
                self.zero_point.copy_(zero)
        return super().quantize(x)


@register_quantizer("int_only", activation=ActivationEMA)
class WeightIntOnly(WeightQuantizer):
    """One affine range a tensor, from the least weight to the greatest, with a whole zero point (eq. 1, 12 and 13).

    Where a BatchNorm reads the outputs of the layer and nothing else does, the tensor is that of section 3.2: the
    weight times ``f = |gamma| / sqrt(running var + eps)``, a number a channel, into which the BatchNorm is folded when
    the network is exported. The layer gets ``Q(w f) / f``, whose step is ``s / f`` a channel, so that the BatchNorm
    stays where it is; folded, every channel has the step ``s``, with the sign of its gamma.

    What differs from the paper: BatchNorm itself normalises by the statistics of the batch and of the quantized
    convolution, which therefore runs once, not twice; f counts as a constant for gradients, since gamma has its own in
    the BatchNorm; the bias of the folded layer is not rounded. A channel whose f is 0 has a range of its own, so that
    its gamma can come back. One bit is sign times a scale a channel here, whatever f; the paper is about 8 bits.

    The range follows the weights and f in training. Afterwards the step ``s`` stays, and f is what the statistics then
    are. At 8 bits the lowest code is not used, so that products fit the paper's 16-bit accumulators (appendix B).

    Args:
        channels: length of the channel axis.
        axis: channel axis of the weight.

    Attributes:
        factor: f, as of the last use; ones without a BatchNorm.
        step: s.
    """

    zero_points = updates_range = True
    factor: torch.Tensor
    step: torch.Tensor

    def __init__(self, channels: int, axis: int = 0) -> None:
        super().__init__(channels, axis, ranges="minmax")
        self.register_buffer("factor", torch.ones(channels, dtype=torch.float32))
        self.register_buffer("step", torch.ones((), dtype=torch.float32))
        self._norm: tuple[nn.Module, ...] = ()  # in a tuple, so that it is no submodule

    def code_formats(self, bits: int) -> tuple[str, ...]:
        """Integers with a zero point; sign times scale at one bit."""
        return ("midrise",) if bits == 1 else ("affine",)

    @property
    def has_even_grid(self) -> bool:
        """See :attr:`WeightQuantizer.has_even_grid`."""
        return True

    @property
    def folding(self) -> bool:  # type: ignore[override]
        """Whether a BatchNorm is folded while training."""
        return bool(self._norm)

    @torch.no_grad()
    def fold(self, norm: nn.Module | None) -> None:
        """See :meth:`WeightQuantizer.fold`."""
        self._norm = () if norm is None else (norm,)
        if norm is None:
            self.factor.fill_(1.0)
        self._take_state()

    @torch.no_grad()
    def disable(self) -> None:
        """See :meth:`Quantizer.disable`."""
        super().disable()
        self.fold(None)

    @torch.no_grad()
    def fit(self, weight: torch.Tensor, bits: int, code: str) -> float:
        """The range of this weight; see :meth:`WeightQuantizer.fit`."""
        if bits == 1:
            return super().fit(weight, bits, code)
        check_finite(weight)
        self._take_state()
        scale, zero = self._range(weight, bits)
        self.enable(bits, scale, float(zero))
        return float((self.eval_weight(weight.detach()).double() - weight.double()).square().sum())

    def quantize(self, weight: torch.Tensor) -> torch.Tensor:
        """Rounded to the grid; in training the range is the present weights' own."""
        if transformed():
            return super().quantize(weight)
        self._take_state()
        if self.training and self.range_updates_enabled and self.bits > 1:
            with torch.no_grad():
                scale, zero = self._range(weight, self.bits)
                self.scale.copy_(scale)
                self.zero_point.copy_(zero)  # not as a number: a GPU would be waited for
        return super().quantize(weight)

    @torch.no_grad()
    def _take_state(self) -> None:
        super()._take_state()
        if self.bits > 1:
            self.zero_point.round_()  # averaging callbacks leave fractions, and 0 would be no level
        if self._norm and (factor := magnitude(self._norm[0], self.factor)) is not None:
            self.factor.copy_(factor)
            if self.bits > 1:
                steps = (self.step / factor).clamp(TINY, HUGE)
                self.scale.copy_(torch.where(factor > 0, steps, self.scale))

    def _range(self, weight: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Steps a channel and the zero point; ``step`` is set."""
        half = 1 << (bits - 1)
        lowest = -half + (bits == 8)
        weight = weight.detach().float()
        factor = torch.where((self.factor > 0).any(), self.factor, 1.0)
        folded = (weight * per_channel_view(factor, weight, self.axis)).clamp(-HUGE, HUGE)
        step, zero = nudged(*torch.aminmax(folded), lowest, half - 1)
        self.step.copy_(step)
        peak = weight.transpose(0, self.axis).flatten(1).abs().amax(1)
        alone = (peak / torch.maximum(zero - lowest, half - 1 - zero)).clamp(TINY, HUGE)
        return torch.where(factor > 0, (step / factor).clamp(TINY, HUGE), alone), zero

    def _load_from_state_dict(self, state_dict: dict[str, torch.Tensor], prefix: str, *args: object) -> None:
        if f"{prefix}scale" in state_dict and f"{prefix}factor" not in state_dict:  # of a version that did not fold
            state_dict[f"{prefix}factor"] = torch.ones_like(self.factor)
            state_dict[f"{prefix}step"] = state_dict[f"{prefix}scale"].flatten()[0]
        norm, self._norm = self._norm, ()  # it may be loaded after this
        try:
            super()._load_from_state_dict(state_dict, prefix, *args)
        finally:
            self._norm = norm


def magnitude(norm: Any, like: torch.Tensor) -> torch.Tensor | None:
    """F of a BatchNorm, 0 where it is no finite number; ``None`` where its state is spread over processes."""
    parts = [t for t in (norm.running_var, norm.weight) if t is not None]
    if any(t.shape != like.shape or type(t) not in (torch.Tensor, nn.Parameter) for t in parts):
        return None
    return gain(norm).abs().float().nan_to_num_(0.0, 0.0).to(like.device)


def nudged(low: torch.Tensor, high: torch.Tensor, lowest: int, highest: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Step and whole zero point of the range nearest to [low, high] that has zero on its grid (section 3)."""
    low, high = low.clamp_max(0.0), high.clamp_min(0.0)
    levels = highest - lowest
    scale = (high / levels - low / levels).clamp(TINY, HUGE)
    return scale, torch.round(lowest - low / scale).clamp(lowest, highest)
