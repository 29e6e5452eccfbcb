"""DoReFa-Net weights (Zhou et al., 2016), and PACT, which puts a learned clipping of activations beside them."""

from __future__ import annotations

import torch
from torch import nn

from hawq_lightning.quantization._fake_quantize import MIDRISE_ZERO, fake_quantize_channels
from hawq_lightning.quantization._quantizers import ActivationQuantizer, WeightQuantizer
from hawq_lightning.quantization._ranges import TINY, check_finite
from hawq_lightning.quantization._registry import register_quantizer
from hawq_lightning.quantization.methods._learned import learned_range, straight_through

_MOST = 1.7e38  # twice it is still a float32


class ActivationPACT(ActivationQuantizer):
    """The clipping point alpha is learned (Choi et al., PACT, 2018).

    Its L2 penalty is weight decay: the tasks' optimizers decay it like weights.

    Args:
        ranges: where alpha starts from: ``mse``, ``minmax`` or ``percentile``.
    """

    alpha: nn.Parameter

    def make_scale(self, shape: tuple[int, ...]) -> None:
        """A float32 Parameter: the width of the range."""
        self.alpha = nn.Parameter(torch.ones(shape, dtype=torch.float32))
        self.alpha.decays = True  # type: ignore[attr-defined]

    def set_scale(self, scale: torch.Tensor) -> None:
        """The value to start from."""
        self.alpha.copy_(scale * self._top)

    @property
    def _top(self) -> int:
        return max(1, (1 << self.bits) - 1)

    @property
    def scale(self) -> torch.Tensor:  # type: ignore[override]
        """The step in use, alpha / (2^b - 1)."""
        return (self._width() / self._top).detach()

    def _width(self) -> torch.Tensor:
        return self.alpha.abs().clamp_min(TINY * self._top)

    def quantize(self, x: torch.Tensor) -> torch.Tensor:
        """Eq. 1 to 3 of the paper."""
        return learned_range(x, self._width(), round(self.zero), self._top)


@register_quantizer("pact", activation=ActivationPACT)
@register_quantizer("dorefa")
class WeightDoReFa(WeightQuantizer):
    """``gain * (2 quantize_b(tanh(w) / (2 max|tanh(w)|) + 1/2) - 1)``, and ``sign(w) * mean|w|`` at one bit.

    The paper trains from scratch with gain 1. A trained network needs its weights' size, so the gain is fitted once,
    by least squares over the layer, and stays. One scale a layer, as in the paper. Activations are clipped to a fixed
    range that calibration takes the place of the paper's [0, 1] by, and rounded evenly.

    Args:
        channels: length of the channel axis.
        axis: channel axis of the weight.
    """

    gain: torch.Tensor

    def __init__(self, channels: int, axis: int = 0) -> None:
        super().__init__(channels, axis)
        self.register_buffer("gain", torch.ones((), dtype=torch.float32))

    def code_formats(self, bits: int) -> tuple[str, ...]:
        """Levels at odd halves at every width."""
        return ("midrise",)

    @torch.no_grad()
    def fit(self, weight: torch.Tensor, bits: int, code: str) -> float:
        """Fit the gain; see :meth:`WeightQuantizer.fit`."""
        check_finite(weight)
        weight = weight.detach().float()
        self.gain.fill_(1.0)
        self.enable(bits, 2.0 / max(1, (1 << bits) - 1) * torch.ones_like(self.scale), MIDRISE_ZERO)
        if bits > 1:
            peak = weight.abs().max().clamp_min(TINY)
            levels = self.quantize(weight)
            gain = ((weight / peak) * levels).double().sum() / levels.double().square().sum()
            self.gain.copy_((gain * peak).clamp_min(TINY * 1e3))
            self.scale.mul_(self.gain)
        return float((self.quantize(weight).double() - weight.double()).square().sum())

    def quantize(self, weight: torch.Tensor) -> torch.Tensor:
        """Eq. 9 of the paper, and eq. 7 and 8 at one bit; gradients pass through rounding and sign."""
        if self.bits == 1:
            with torch.no_grad():  # the scale is the weights' own, which change
                mean = (weight.detach().float().abs() / max(1, weight.numel())).sum().clamp(TINY, _MOST)
                self.scale.copy_((2 * mean).expand(self.scale.shape))
                levels = torch.where(weight < 0, -0.5 * (2 * mean), 0.5 * (2 * mean))
            return straight_through(weight, levels.to(weight.dtype))
        tanh = torch.tanh(weight)
        if tanh.requires_grad and not torch.compiler.is_compiling():
            tanh.register_hook(torch.nan_to_num)  # weights near the end of float32 have infinite gradients here
        bounded = tanh / tanh.abs().max().clamp_min(TINY) * self.gain.to(weight.dtype)
        return fake_quantize_channels(bounded, self.scale, self.zero_point, self.axis, 1 << (self.bits - 1))
