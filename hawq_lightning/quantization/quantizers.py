"""Fake quantizers: Q(.) of the paper, with straight-through gradients.

State lives in persistent *float32* buffers that hold integers (weight averaging and `bf16-true` ruin integer buffers),
so that a plain state dict carries the plan. Python mirrors of the integers, which the kernels want, are refreshed
whenever a state dict is loaded.

A new quantizer overrides :meth:`WeightQuantizer.quantize` or :meth:`ActivationQuantizer.quantize`, and is found by the
name that :func:`hawq_lightning.quantization.register` gives it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from hawq_lightning.errors import HawqError, nearest
from hawq_lightning.plan import ACTIVATION_BITS, WEIGHT_BITS
from hawq_lightning.quantization.kernels import (
    MIDRISE_ZERO,
    along,
    fake_quantize_channels,
    fake_quantize_tensor,
    touch,
)
from hawq_lightning.quantization.lean import repeatable
from hawq_lightning.quantization.ranges import ACTIVATION_RANGES, WEIGHT_RANGES, activation_step, weight_step

_DEFAULT = "uniform"
_MARK = "quantizer_"


class Quantizer(nn.Module):
    """What weight and activation quantizers share: bits (0 is off), a step ``scale`` and a ``zero_point``.

    Args:
        channels: number of scales.

    Attributes:
        bits: code width; 0 means the identity.
        zero: ``zero_point`` as a Python number, as of the last :meth:`refresh`.
        paused: the identity for a while, whatever the bits.
        observing: whether ranges that follow the data may move in training; a schedule may switch it off.
    """

    def __init__(self, channels: int | None = None) -> None:
        super().__init__()
        self.register_buffer("width", torch.zeros(()))
        self.make_scale(() if channels is None else (channels,))
        self.register_buffer("zero_point", torch.zeros(()))
        self.bits = 0
        self.zero = 0.0
        self.paused = False
        self.observing = True
        self._leader: tuple[Quantizer, ...] = ()  # in a tuple, so that it is no submodule

    width: torch.Tensor
    scale: torch.Tensor
    zero_point: torch.Tensor
    follows_data = False  # whether the grid moves in training without gradients

    def make_scale(self, shape: tuple[int, ...]) -> None:
        """Register what ``scale`` is kept in: a buffer, or a Parameter where it is learned."""
        self.register_buffer("scale", torch.ones(shape))

    def set_scale(self, scale: torch.Tensor) -> None:
        """Fill it, in place."""
        self.scale.copy_(scale)

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
        scale = torch.as_tensor(scale, dtype=torch.float32, device=self.width.device)
        if not bool((torch.isfinite(scale) & (scale > 0)).all()):
            raise HawqError("A quantization step must be positive and finite; weights or activations hold NaN or Inf.")
        self.width.fill_(float(bits))
        self.bits = bits
        self.zero_point.fill_(float(zero_point))
        self.set_scale(scale)
        self.refresh()

    def follow(self, leader: Quantizer) -> None:
        """Share a grid that moves in training: from now on ``leader`` quantizes here too, and this one's state follows.

        Layers of one site have a quantizer each, since sites are not known yet when optimizers are made.
        """
        self._leader = (leader,)

    @torch.no_grad()
    def _take_state(self) -> None:
        for leader in self._leader:
            for mine, theirs in zip(self._tensors(), leader._tensors()):
                mine.copy_(theirs)
            self.bits, self.zero = leader.bits, leader.zero

    def _tensors(self) -> list[torch.Tensor]:
        return [*self.parameters(), *self.buffers()]

    @torch.no_grad()
    def disarm(self) -> None:
        """Switch off: the identity again."""
        self._leader = ()
        self.width.zero_()
        self.refresh()

    def refresh(self) -> None:
        """Bring the Python mirrors in line with the buffers (rounded: averaging callbacks leave 3.9999)."""
        self._take_state()
        self.bits = round(float(self.width))
        self.zero = round(2 * float(self.zero_point)) / 2

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Fake-quantize; same shape and dtype. The identity while off or paused."""
        if self.paused:
            return self._untouched(x)
        if self._leader:
            self._take_state()
            return self._leader[0](self._untouched(x))
        return self.quantize(x) if self.bits else self._untouched(x)

    def _untouched(self, x: torch.Tensor) -> torch.Tensor:
        learned = [p for p in self.parameters() if p.requires_grad] if self.training else []
        return touch(x, *learned) if learned and torch.is_grad_enabled() else x

    @property
    def moves(self) -> bool:
        """Whether training changes the grid: by gradients, or by watching what passes."""
        return type(self).follows_data or next(self.parameters(), None) is not None

    def quantize(self, x: torch.Tensor) -> torch.Tensor:
        """Q(.) at the present bits: what a subclass defines, with the gradients that it wants."""
        raise NotImplementedError

    def _save_to_state_dict(self, *args: Any) -> None:
        self._take_state()
        super()._save_to_state_dict(*args)

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
    (at one bit: sign times scale, as in DoReFa). Steps are fitted when armed and then stay.

    Args:
        channels: length of the channel axis.
        axis: channel axis of the weight.
        ranges: ``mse`` (steps of least squared error), ``minmax`` (the largest weight is on the grid) or
            ``percentile`` (all but the largest 0.1 % are).
        reestimate: fit again after every so many training steps; 0: never.
    """

    zero_points = False  # whether affine codes have zero points of their own
    folding = False  # whether the grid is one of the weight with a BatchNorm in it

    def __init__(self, channels: int, axis: int = 0, *, ranges: str = "mse", reestimate: int = 0) -> None:
        super().__init__(channels)
        self.axis = axis
        self.ranges = one_of("ranges", ranges, WEIGHT_RANGES)
        if isinstance(reestimate, bool) or not isinstance(reestimate, int) or reestimate < 0:
            raise HawqError(f"reestimate is {reestimate!r}; it is a number of training steps, 0 or more.")
        self.reestimate = reestimate
        self._steps = 0

    def named(self, name: str) -> None:
        """Let state dicts tell the registered name, in a key, since values are numbers; ``uniform`` goes without."""
        if name != _DEFAULT:
            self.register_buffer(_MARK + name, torch.zeros((), device=self.width.device))

    @property
    def name(self) -> str:
        """Registered name."""
        return named_in(self._buffers)

    @property
    def code(self) -> str:
        """Code kind."""
        return "midrise" if self.zero % 1 else "affine"

    def kinds(self, bits: int) -> tuple[str, ...]:
        """Code kinds that this quantizer has at a width; where several do, the first is tried first."""
        return ("midrise",) if bits == 1 else ("affine", "midrise")

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        own = [key.removeprefix(prefix) for key in state_dict if key.startswith(prefix)]
        if own and (trained := named_in(own)) != self.name:
            raise HawqError(
                f"{prefix.removesuffix('.weight_quantizer.')!r} was trained with quantizer {trained!r}, but this "
                f"network has {self.name!r}; build it with quantizer={trained!r}."
            )
        super()._load_from_state_dict(state_dict, prefix, *args)

    def fold(self, norm: nn.Module | None) -> None:
        """Told before :meth:`fit` which BatchNorm reads the layer's outputs, alone; quantizers that fold it override.

        Args:
            norm: with running statistics; ``None``: there is none.
        """

    @torch.no_grad()
    def fit(self, weight: torch.Tensor, bits: int, code: str) -> float:
        """Switch on, with ranges for this weight.

        Args:
            weight: any shape whose ``axis`` has ``channels`` entries.
            bits: 1 to 8.
            code: one of :meth:`kinds`.

        Returns:
            ``||Q(W) - W||^2``.

        Raises:
            HawqError: the weight holds NaN or infinity.
        """
        step, error = weight_step(weight, bits, code, self.axis, self.ranges)
        self.arm(bits, step, MIDRISE_ZERO if code == "midrise" else 0.0)
        return error

    @repeatable
    def quantize(self, weight: torch.Tensor) -> torch.Tensor:
        """Rounded to the grid; the gradient passes unchanged inside of the range and stops outside."""
        if self.reestimate and self.training and self.observing:
            self._steps += 1
            if self._steps % self.reestimate == 0:
                self.fit(weight.detach(), self.bits, self.code)
        return fake_quantize_channels(weight, self.scale, self.zero_point, self.axis, 1 << (self.bits - 1))

    @torch.no_grad()
    def settled(self, weight: torch.Tensor) -> torch.Tensor:
        """The quantized weight as evaluation sees it: in training mode too, no range moves."""
        if self._leader:
            self.refresh()
            leader = self._leader[0]
            assert isinstance(leader, WeightQuantizer)
            return leader.settled(weight)
        mode, self.training = self.training, False
        try:
            return self(weight)
        finally:
            self.training = mode

    @torch.no_grad()
    def codes(self, weight: torch.Tensor) -> torch.Tensor:
        """Integer codes (int32, the weight's shape) that the fake-quantized weight stands for.

        Raises:
            HawqError: the quantizer is off.
        """
        if self.bits == 0:
            raise HawqError("This quantizer is off; it has no codes.")
        levels = self.settled(weight)
        return torch.round(levels / along(self.scale, weight, self.axis) + self.zero_point).to(torch.int32)

    @torch.no_grad()
    def dequantize(self, codes: torch.Tensor) -> torch.Tensor:
        """The float32 weight that integer ``codes`` stand for, bit-identical to ``self(weight)``."""
        return (codes.to(torch.float32) - self.zero_point) * along(self.scale, codes, self.axis)


class ActivationQuantizer(Quantizer):
    """One step a tensor; codes in [0, 2^b - 1], an integer ``zero_point`` (0: unsigned), so zero is on the grid.

    Args:
        ranges: ``mse`` (the step of least squared error), ``minmax`` or ``percentile`` (0.1 % beyond either end).
    """

    def __init__(self, *, ranges: str = "mse") -> None:
        super().__init__()
        self.ranges = one_of("ranges", ranges, ACTIVATION_RANGES)

    def calibrate(self, sample: torch.Tensor, low: float, high: float, bits: int) -> tuple[float, int]:
        """Step and zero point for one site, before training.

        Args:
            sample: values of the activation, flat.
            low: the least value seen.
            high: the greatest value seen.
            bits: 2 to 8.

        Raises:
            HawqError: NaN or infinity.
        """
        return activation_step(sample, low, high, bits, self.ranges)

    @repeatable
    def quantize(self, x: torch.Tensor) -> torch.Tensor:
        """Rounded to the grid; the gradient passes unchanged inside of the range and stops outside."""
        return fake_quantize_tensor(x, self.scale, self.zero_point, (1 << self.bits) - 1)


def named_in(keys: Iterable[str]) -> str:
    """The quantizer that the keys of one weight quantizer's state tell of."""
    return next((k.removeprefix(_MARK) for k in keys if k.startswith(_MARK)), _DEFAULT)


def one_of(what: str, value: Any, known: tuple[str, ...]) -> str:
    """Return ``value``, or raise HawqError unless it is one of ``known``."""
    if value not in known:
        raise HawqError(f"{what}={value!r} is unknown; use one of {', '.join(known)}.{nearest(str(value), known)}")
    return str(value)


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
