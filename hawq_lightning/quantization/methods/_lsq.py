"""LSQ: the step is learned with the weights (Esser et al., Learned Step Size Quantization, ICLR 2020)."""

from __future__ import annotations

import math

import torch
from torch import nn

from hawq_lightning._torch_state import traced
from hawq_lightning.layers import deterministic
from hawq_lightning.quantization._fake_quantize import per_channel_view
from hawq_lightning.quantization._quantizer import Quantizer
from hawq_lightning.quantization._quantizers import ActivationQuantizer, WeightQuantizer
from hawq_lightning.quantization._ranges import TINY, Ranges
from hawq_lightning.quantization._registry import register_quantizer
from hawq_lightning.quantization.methods._learned import learned_step


class _LearnedStep(Quantizer):
    """The step as a Parameter. An optimizer may take it through zero, so its magnitude counts."""

    step: nn.Parameter

    def make_scale(self, shape: tuple[int, ...]) -> None:
        """A float32 Parameter."""
        self.step = nn.Parameter(torch.ones(shape, dtype=torch.float32))

    def set_scale(self, scale: torch.Tensor) -> None:
        """The value to start from."""
        self.step.copy_(scale)

    @property
    def scale(self) -> torch.Tensor:  # type: ignore[override]
        """The step in use, positive."""
        return self.positive_step().detach()

    def positive_step(self) -> torch.Tensor:
        """With its gradient."""
        return self.step.abs().clamp_min(TINY)


class ActivationLSQ(_LearnedStep, ActivationQuantizer):
    """One learned step a tensor. The zero point, for inputs below zero, stays as calibrated.

    The step's gradient is scaled by 1 / sqrt(N * Qp), N the features of one image and Qp the highest level.

    Args:
        ranges: where the step starts from: ``mse``, ``minmax`` or ``percentile``.
    """

    @deterministic
    def quantize(self, x: torch.Tensor) -> torch.Tensor:
        """Eq. 1 and 2 of the paper."""
        top, zero = (1 << self.bits) - 1, round(self.zero)
        if traced():  # sizes are no numbers then, and nothing is learned
            return learned_step(x, self.positive_step(), zero, 0, top, 1.0)
        features = x.numel() // max(1, x.shape[0]) if x.ndim > 1 else x.numel()
        factor = 1 / math.sqrt(max(1, features) * max(1, top - zero))
        return learned_step(x, self.positive_step(), zero, 0, top, factor)


@register_quantizer("lsq", activation=ActivationLSQ)
class WeightLSQ(_LearnedStep, WeightQuantizer):
    """One learned step a channel; signed codes, or at one bit sign times step / 2.

    The step's gradient is scaled by 1 / sqrt(N * Qp) with N the weights that share it. It starts from the step of
    least squared error rather than the paper's 2 mean|w| / sqrt(Qp): fine-tuning a trained network should begin with
    the network that the plan was chosen by. In optimizers of your own keep steps (tensors of one axis or none) out of
    weight decay.

    Args:
        channels: length of the channel axis.
        axis: channel axis of the weight.
        ranges: where steps start from: ``mse``, ``minmax`` or ``percentile``.
    """

    def __init__(self, channels: int, axis: int = 0, *, ranges: Ranges = "mse") -> None:
        super().__init__(channels, axis, ranges=ranges)

    @property
    def has_even_grid(self) -> bool:
        """See :attr:`WeightQuantizer.has_even_grid`."""
        return True

    @deterministic
    def quantize(self, weight: torch.Tensor) -> torch.Tensor:
        """Eq. 1 and 2 of the paper, per channel."""
        half, zero = 1 << (self.bits - 1), -0.5 if self.code == "midrise" else 0.0
        sharing = 1 if traced() else weight.numel() // max(1, weight.shape[self.axis])
        factor = 1 / math.sqrt(max(1, sharing) * (half - 1 - zero))
        step = per_channel_view(self.positive_step(), weight, self.axis)
        return learned_step(weight, step, zero, -half, half - 1, factor)
