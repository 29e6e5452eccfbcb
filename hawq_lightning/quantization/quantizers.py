"""Fake quantizers: Q(.) of the paper, with straight-through gradients from torch's fused kernels.

State lives in persistent *float32* buffers that hold integers (weight averaging and `bf16-true` ruin integer buffers),
so that a plain state dict carries the plan. Python mirrors of the integers, which the kernels want, are refreshed
whenever a state dict is loaded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from hawq_lightning.errors import HawqError
from hawq_lightning.plan import ACTIVATION_BITS, WEIGHT_BITS

MIDRISE_ZERO = -0.5  # (code - zero) * scale: levels at odd halves


class Quantizer(nn.Module):
    """What weight and activation quantizers share: bits (0 is off), a step ``scale`` and a ``zero_point``.

    Args:
        channels: number of scales.

    Attributes:
        bits: code width; 0 means the identity.
    """

    def __init__(self, channels: int | None = None) -> None:
        super().__init__()
        shape = () if channels is None else (channels,)
        self.register_buffer("width", torch.zeros(()))
        self.register_buffer("scale", torch.ones(shape))
        self.register_buffer("zero_point", torch.zeros(()))
        self.bits = 0
        self.paused = False

    width: torch.Tensor
    scale: torch.Tensor
    zero_point: torch.Tensor

    @torch.no_grad()
    def arm(self, bits: int, scale: torch.Tensor | float, zero_point: float = 0.0) -> None:
        """Switch on, in place.

        Args:
            bits: code width.
            scale: positive step, one a channel for weights.
            zero_point: what stands for 0 on the integer grid.

        Raises:
            HawqError: a step that is not positive and finite.
        """
        scale = torch.as_tensor(scale, dtype=torch.float32, device=self.scale.device)
        if not bool((torch.isfinite(scale) & (scale > 0)).all()):
            raise HawqError("A quantization step must be positive and finite; weights or activations hold NaN or Inf.")
        self.scale.copy_(scale)
        self.width.fill_(float(bits))
        self.zero_point.fill_(float(zero_point))
        self.refresh()

    @torch.no_grad()
    def disarm(self) -> None:
        """Switch off: the identity again."""
        self.width.zero_()
        self.refresh()

    def refresh(self) -> None:
        """Bring the Python mirror in line with the buffers (rounded: averaging callbacks leave 3.9999)."""
        self.bits = round(float(self.width))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if not any(key.startswith(prefix) for key in state_dict):
            return  # a float checkpoint says nothing about quantizers; it must not disarm them
        super()._load_from_state_dict(state_dict, prefix, *args)
        self.refresh()

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Quantizer:
        # follow the device, never the dtype: a bf16 step is another step
        return super()._apply(lambda t: t.to(fn(t).device), recurse)  # type: ignore[return-value]

    def extra_repr(self) -> str:
        """Bits, or off."""
        return f"{self.bits} bits" if self.bits else "off"


class WeightQuantizer(Quantizer):
    """Symmetric, one step a channel; levels ``(code - zero_point) * scale`` with ``code`` in [-2^(b-1), 2^(b-1)-1].

    Code kind ``affine`` has zero_point 0; ``midrise`` has -1/2, so that all 2^b levels are symmetric about zero
    (at one bit: sign times scale, as in DoReFa).

    Args:
        channels: length of the channel axis.
        axis: channel axis of the weight.
    """

    def __init__(self, channels: int, axis: int = 0) -> None:
        super().__init__(channels)
        self.axis = axis

    @property
    def code(self) -> str:
        """Code kind."""
        return "midrise" if float(self.zero_point) != 0.0 else "affine"

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        """Fake-quantize a weight of any shape whose ``axis`` has ``channels`` entries; same shape and dtype."""
        if self.bits == 0 or self.paused:
            return weight
        half = 1 << (self.bits - 1)
        zero = self.zero_point.expand(self.scale.shape).contiguous()
        return torch.fake_quantize_per_channel_affine(weight, self.scale, zero, self.axis, -half, half - 1)

    @torch.no_grad()
    def codes(self, weight: torch.Tensor) -> torch.Tensor:
        """Integer codes (int32, the weight's shape) that the fake-quantized weight stands for.

        Raises:
            HawqError: the quantizer is off.
        """
        if self.bits == 0:
            raise HawqError("This quantizer is off; it has no codes.")
        return torch.round(self(weight) / self._along(weight) + self.zero_point).to(torch.int32)

    @torch.no_grad()
    def dequantize(self, codes: torch.Tensor) -> torch.Tensor:
        """The float32 weight that integer ``codes`` stand for, bit-identical to ``self(weight)``."""
        return (codes.to(torch.float32) - self.zero_point) * self._along(codes)

    def _along(self, weight: torch.Tensor) -> torch.Tensor:
        shape = [1] * weight.ndim
        shape[self.axis] = -1
        return self.scale.view(shape)


class ActivationQuantizer(Quantizer):
    """One step a tensor; codes in [0, 2^b - 1], an integer ``zero_point`` (0: unsigned), so zero is on the grid."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Fake-quantize a tensor of any shape; same shape and dtype."""
        if self.bits == 0 or self.paused:
            return x
        zero = self.zero_point.to(torch.int32)
        return torch.fake_quantize_per_tensor_affine(x, self.scale, zero, 0, (1 << self.bits) - 1)


def check_bits(values: Any, kind: str) -> tuple[int, ...]:
    """Widths that a user asked for, as an ascending tuple.

    Args:
        values: an int or several.
        kind: ``weight`` or ``activation``.

    Raises:
        HawqError: not whole numbers, or out of range (1 to 8 for weights, 2 to 8 for activations).
    """
    allowed = WEIGHT_BITS if kind == "weight" else ACTIVATION_BITS
    listed = list(values) if isinstance(values, (list, tuple, range, set)) or hasattr(values, "__iter__") else [values]
    if not listed:
        raise HawqError(f"{kind}_bits is empty; give at least one width from {allowed[0]} to {allowed[-1]}.")
    for value in listed:
        if isinstance(value, bool) or not isinstance(value, int) or value not in allowed:
            near = min(allowed, key=lambda b: abs(b - value)) if isinstance(value, (int, float)) else allowed[-1]
            raise HawqError(
                f"{kind}_bits has {value!r}; allowed are {allowed[0]} to {allowed[-1]}, the nearest is {near}."
            )
    return tuple(sorted(set(listed)))
