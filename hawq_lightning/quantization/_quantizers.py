"""Fake quantizers: Q(.) of the paper, with straight-through gradients.

A new quantizer overrides :meth:`WeightQuantizer.quantize` or :meth:`ActivationQuantizer.quantize`, and is found by the
name that :func:`hawq_lightning.quantization.register_quantizer` gives it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

import torch
from torch import nn

from hawq_lightning._errors import HawqError, choice
from hawq_lightning.layers import deterministic
from hawq_lightning.quantization._fake_quantize import (
    MIDRISE_ZERO,
    fake_quantize_channels,
    fake_quantize_tensor,
    per_channel_view,
)
from hawq_lightning.quantization._quantizer import Quantizer, is_quantizer_state
from hawq_lightning.quantization._ranges import RANGES, Ranges, activation_step, weight_step
from hawq_lightning.quantization._storage import Storage

_DEFAULT = "uniform"
_MARK = "quantizer_"
_OF_WEIGHT = re.compile(r"(?P<module>.+)\.(?P<attribute>\w+_quantizer)\.(?P<buffer>\w+)")
_OF_INPUT = "input_quantizer"


class WeightQuantizer(Quantizer):
    """Symmetric, one step a channel; levels ``(code - zero_point) * scale`` with ``code`` in [-2^(b-1), 2^(b-1)-1].

    Code format ``affine`` has zero_point 0; ``midrise`` has -1/2, so that all 2^b levels are symmetric about zero
    (at one bit: sign times scale, as in DoReFa). Steps are fitted when the quantizer is enabled and then stay.

    Args:
        channels: length of the channel axis.
        axis: channel axis of the weight.
        ranges: ``mse`` (steps of least squared error), ``minmax`` (the largest weight is on the grid) or
            ``percentile`` (all but the largest 0.1 % are).
        reestimate: fit again after every so many optimizer steps, see
            :func:`hawq_lightning.quantization.reestimate`; 0: never.
    """

    zero_points = False  # whether affine codes have zero points of their own
    folding = False  # whether the grid is one of the weight with a BatchNorm in it

    def __init__(self, channels: int, axis: int = 0, *, ranges: Ranges = "mse", reestimate: int = 0) -> None:
        super().__init__(channels)
        self.axis = axis
        self.ranges = choice("ranges", ranges, RANGES)
        if isinstance(reestimate, bool) or not isinstance(reestimate, int) or reestimate < 0:
            raise HawqError(f"reestimate is {reestimate!r}; it is a number of training steps, 0 or more.")
        self.reestimate = reestimate

    def named(self, name: str) -> None:
        """Let state dicts tell the registered name, in a key, since values are numbers; ``uniform`` goes without."""
        if name != _DEFAULT:
            self.register_buffer(_MARK + name, torch.zeros((), dtype=torch.float32, device=self.num_bits.device))

    @property
    def name(self) -> str:
        """Registered name."""
        return named_in(self._buffers)

    @property
    def code(self) -> str:
        """Code format."""
        return "midrise" if self.zero % 1 else "affine"

    @property
    def has_even_grid(self) -> bool:
        """Whether a weight is rounded as it is to even steps of ``scale``, and not squashed or looked up."""
        return type(self).quantize is WeightQuantizer.quantize

    def code_formats(self, bits: int) -> tuple[str, ...]:
        """Code formats that this quantizer has at a width; where several do, the first is tried first."""
        return ("midrise",) if bits == 1 else ("affine", "midrise")

    def _load_from_state_dict(self, state_dict: dict[str, torch.Tensor], prefix: str, *args: object) -> None:
        names = [key.removeprefix(prefix) for key in state_dict if key.startswith(prefix)]
        if names and (trained := named_in(names)) != self.name:
            raise HawqError(
                f"{prefix.rstrip('.').rpartition('.')[0]!r} was trained with quantizer {trained!r}, but this "
                f"network has {self.name!r}; build it with quantizer={trained!r}."
            )
        super()._load_from_state_dict(state_dict, prefix, *args)

    def fold(self, norm: nn.Module | None) -> None:
        """Told before :meth:`fit` which BatchNorm reads the layer's outputs, alone; quantizers that fold it override.

        Args:
            norm: with running statistics; ``None``: there is none.
        """

    def shaped(self, shape: tuple[int, ...]) -> None:
        """Told the weight's shape where only sizes are asked for; quantizers that keep some weights override.

        Args:
            shape: of the weight.
        """

    def check_fits(self, shape: tuple[int, ...]) -> None:
        """Refuse, after :meth:`from_storage`, what is of a weight of another shape.

        Args:
            shape: of the weight.

        Raises:
            HawqError: it is.
        """

    @torch.no_grad()
    def fit(self, weight: torch.Tensor, bits: int, code: str) -> float:
        """Switch on, with ranges for this weight.

        Args:
            weight: any shape whose ``axis`` has ``channels`` entries.
            bits: 1 to 8.
            code: one of :meth:`code_formats`.

        Returns:
            ``||Q(W) - W||^2``.

        Raises:
            HawqError: the weight holds NaN or infinity.
        """
        step, error = weight_step(weight, bits, code, self.axis, self.ranges)
        self.enable(bits, step, MIDRISE_ZERO if code == "midrise" else 0.0)
        return error

    @deterministic
    def quantize(self, weight: torch.Tensor) -> torch.Tensor:
        """Rounded to the grid; the gradient passes unchanged inside of the range and stops outside."""
        half = 1 << (self.bits - 1)
        return fake_quantize_channels(weight, self.scale, self.zero_point, self.axis, half, self.kernel)

    @torch.no_grad()
    def eval_weight(self, weight: torch.Tensor) -> torch.Tensor:
        """The quantized weight as evaluation sees it: in training mode too, no range moves."""
        if self._tied_to:
            self.refresh()
            leader = self._tied_to[0]
            assert isinstance(leader, WeightQuantizer)
            return leader.eval_weight(weight)
        mode, self.training = self.training, False
        try:
            levels: torch.Tensor = self(weight)
            return levels
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
        levels = self.eval_weight(weight)
        return torch.round(levels / per_channel_view(self.scale, weight, self.axis) + self.zero_point).to(torch.int32)

    @torch.no_grad()
    def dequantize(self, codes: torch.Tensor) -> torch.Tensor:
        """The float32 weight that integer ``codes`` stand for, bit-identical to ``self(weight)``."""
        return (codes.to(torch.float32) - self.zero_point) * per_channel_view(self.scale, codes, self.axis)

    @torch.no_grad()
    def storage(self) -> Storage:
        """The scale of every channel; the zero point where affine codes may have one."""
        tensors = {"scale": self.scale.detach().float().cpu().reshape(-1)}
        zero_point = 0 if self.code == "midrise" else round(float(self.zero_point))
        if self.zero_points or zero_point:
            tensors["zero_point"] = torch.tensor(float(zero_point), dtype=torch.float32)
        return Storage(tensors)

    @torch.no_grad()
    def from_storage(self, bits: int, code_format: str, storage: Storage) -> None:
        """See :meth:`Quantizer.from_storage`."""
        storage.only("scale", "zero_point")
        if code_format not in ("affine", "midrise"):
            raise HawqError(f"code format {code_format!r} is none of quantizer {self.name!r}")
        scale, half = storage.tensor("scale", tuple(self.scale.shape)), 1 << (bits - 1)
        zero_point = float(storage.tensor("zero_point", ())) if "zero_point" in storage.tensors else 0.0
        if zero_point not in range(-half, half) or (code_format == "midrise" and zero_point):
            raise HawqError(f"zero_point is {zero_point}, which {code_format} codes of {bits} bits do not have")
        if not bool((scale > 0).all()):
            raise HawqError("scale is not positive")
        self.enable(bits, scale, MIDRISE_ZERO if code_format == "midrise" else zero_point)


class ActivationQuantizer(Quantizer):
    """One step a tensor; codes in [0, 2^b - 1], an integer ``zero_point`` (0: unsigned), so zero is on the grid.

    Args:
        ranges: ``mse`` (the step of least squared error), ``minmax`` or ``percentile`` (0.1 % beyond either end).
    """

    def __init__(self, *, ranges: Ranges = "mse") -> None:
        super().__init__()
        self.ranges = choice("ranges", ranges, RANGES)

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

    @property
    def code(self) -> str:
        """Code format; other names than ``affine`` are for sizes, since codes of activations are not stored."""
        return "affine"

    def levels_at(self, x: torch.Tensor, step: float, zero: int, bits: int) -> torch.Tensor:
        """What a calibrated grid makes of values, without switching on.

        Args:
            x: any shape.
            step: of :meth:`calibrate`.
            zero: of :meth:`calibrate`.
            bits: 2 to 8.
        """
        return fake_quantize_tensor(
            x, torch.tensor(step, dtype=torch.float32), torch.tensor(float(zero), dtype=torch.float32), (1 << bits) - 1
        )

    @deterministic
    def quantize(self, x: torch.Tensor) -> torch.Tensor:
        """Rounded to the grid; the gradient passes unchanged inside of the range and stops outside."""
        return fake_quantize_tensor(x, self.scale, self.zero_point, (1 << self.bits) - 1, self.kernel)

    def storage(self) -> Storage:
        """Scale and zero point, two numbers."""
        return Storage(facts={"scale": float(self.scale), "zero_point": round(float(self.zero_point))})

    @torch.no_grad()
    def from_storage(self, bits: int, code_format: str, storage: Storage) -> None:
        """See :meth:`Quantizer.from_storage`."""
        storage.only("scale", "zero_point")
        self.enable(bits, *self._stored_grid(bits, code_format, storage))

    def _stored_grid(self, bits: int, code_format: str, storage: Storage) -> tuple[float, float]:
        scale, zero_point = storage.number("scale"), storage.number("zero_point")
        if code_format != self.code:
            raise HawqError(f"activations have no {code_format} codes")
        if zero_point not in range(1 << bits):
            raise HawqError(f"zero_point is {zero_point:g}, which codes of {bits} bits do not have")
        if float(torch.tensor(scale, dtype=torch.float32)) != scale or not scale > 0:
            raise HawqError(f"scale is {scale!r}, not a positive float32")
        return scale, zero_point


def named_in(keys: Iterable[str]) -> str:
    """The quantizer that the keys of one weight quantizer's state tell of."""
    return next((k.removeprefix(_MARK) for k in keys if k.startswith(_MARK)), _DEFAULT)


def trained_quantizers(state_dict: Iterable[str]) -> dict[str, str]:
    """The modules of fake-quant layers that a state dict is of, with the registered names of their quantizers.

    Args:
        state_dict: or its keys; of this release or of 0.1.0.
    """
    states: dict[tuple[str, str], list[str]] = {}
    for key in state_dict:
        if (of_weight := _OF_WEIGHT.fullmatch(key)) and not of_weight["attribute"].endswith(_OF_INPUT):
            states.setdefault((of_weight["module"], of_weight["attribute"]), []).append(of_weight["buffer"])
    # a module of the user's may be called so as well
    return {module: named_in(buffers) for (module, _), buffers in states.items() if is_quantizer_state(buffers)}
