"""What an integer program consists of: a few kinds of steps, each with its arithmetic in numpy.

Tensors are UINT8 codes or INT32 sums; INT64 appears inside of a step. A step knows its result's least and greatest
number, so that no sum can leave its type.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from hawq_lightning.export.onnx.integer_only._dyadic import Dyadic
from hawq_lightning.export.onnx.integer_only._moves import MOVES, SHAPES
from hawq_lightning.export.onnx.integer_only._windows import Window, convolve

Tensors = Mapping[str, np.ndarray]
Dtype = type[np.uint8] | type[np.int32]
LARGEST = (1 << 31) - 1  # of INT32


@dataclass(frozen=True)
class Step:
    """One tensor from others.

    Attributes:
        result: name of what it makes.
        reads: names of what it reads.
    """

    result: str
    reads: tuple[str, ...]

    def run(self, tensors: Tensors) -> np.ndarray:
        """The result."""
        raise NotImplementedError


@dataclass(frozen=True)
class Convolution(Step):
    """``sum of (x - zero) * weight + bias`` over windows, INT32.

    Attributes:
        zero: code of 0 of what it reads.
        weight: integers ``[C_out, C / groups, kernel ...]``.
        bias: INT32 ``[C_out]``, or ``None``.
        window: strides, dilations and padding, which is of zeros.
        groups: of channels.
    """

    zero: int
    weight: np.ndarray
    bias: np.ndarray | None
    window: Window
    groups: int

    def run(self, tensors: Tensors) -> np.ndarray:
        x = tensors[self.reads[0]].astype(np.int32) - np.int32(self.zero)
        sums = convolve(x, self.weight.astype(np.int32), self.window, self.groups)
        if self.bias is not None:
            sums = sums + self.bias.reshape(-1, *[1] * len(self.window.kernel))
        return sums


@dataclass(frozen=True)
class Product(Step):
    """``(x - zero) @ weight + bias``, INT32.

    Attributes:
        zero: code of 0 of what it reads.
        weight: integers ``[K, M]``.
        bias: INT32 ``[M]``, or ``None``.
    """

    zero: int
    weight: np.ndarray
    bias: np.ndarray | None

    def run(self, tensors: Tensors) -> np.ndarray:
        x = tensors[self.reads[0]].astype(np.int32) - np.int32(self.zero)
        sums = np.asarray(np.einsum("...k,km->...m", x, self.weight.astype(np.int32)))
        return sums if self.bias is None else sums + self.bias


@dataclass(frozen=True)
class Requantize(Step):
    """``clip((sum of b_i * x_i + a) >> c, low, high)``: everything that puts numbers onto another grid, sums included.

    Attributes:
        numbers: b, a and c, of INT64.
        low: least code.
        high: greatest code.
        dtype: UINT8, or INT32 of an output.
    """

    numbers: Dyadic
    low: int
    high: int
    dtype: Dtype

    def run(self, tensors: Tensors) -> np.ndarray:
        total: np.ndarray = self.numbers.offset
        for name, multiplier in zip(self.reads, self.numbers.multipliers):
            total = total + tensors[name].astype(np.int64) * multiplier
        return np.asarray(np.clip(total >> self.numbers.shift, self.low, self.high), self.dtype)


@dataclass(frozen=True)
class Lookup(Step):
    """``table[x]``: a function of one tensor of codes.

    Attributes:
        table: 256 numbers, UINT8 codes or INT32.
    """

    table: np.ndarray

    def run(self, tensors: Tensors) -> np.ndarray:
        return np.asarray(self.table[tensors[self.reads[0]]])


@dataclass(frozen=True)
class Multiplication(Step):
    """``(x - zeros[0]) * (y - zeros[1])``, INT32.

    Attributes:
        zeros: codes of 0.
    """

    zeros: tuple[int, int]

    def run(self, tensors: Tensors) -> np.ndarray:
        x, y = (tensors[name].astype(np.int32) - np.int32(z) for name, z in zip(self.reads, self.zeros))
        return np.asarray(x * y)


@dataclass(frozen=True)
class WindowSum(Step):
    """``sum of (x - zero)`` over windows of each channel, INT32: average pooling but for the division.

    Attributes:
        zero: code of 0.
        window: where the windows lie; padded with zeros.
        shape: channels and positions of what it reads.
    """

    zero: int
    window: Window
    shape: tuple[int, ...]

    def run(self, tensors: Tensors) -> np.ndarray:
        x = tensors[self.reads[0]].astype(np.int32) - np.int32(self.zero)
        view = self.window.view(x)
        return np.asarray(view.sum(tuple(range(-len(self.window.kernel), 0)), dtype=np.int32))


@dataclass(frozen=True)
class AxisSum(Step):
    """``sum of (x - zero)`` over axes, INT32: a mean but for the division.

    Attributes:
        zero: code of 0.
        axes: not negative.
        keep: whether they stay with one element.
    """

    zero: int
    axes: tuple[int, ...]
    keep: bool

    def run(self, tensors: Tensors) -> np.ndarray:
        x = tensors[self.reads[0]].astype(np.int32) - np.int32(self.zero)
        return np.asarray(x.sum(self.axes, dtype=np.int32, keepdims=self.keep))


@dataclass(frozen=True)
class Move(Step):
    """An operator of ONNX that only moves integers, or takes the largest.

    Attributes:
        op: its name.
        attributes: of it.
        constants: inputs that are stored.
    """

    op: str
    attributes: Mapping[str, object] = field(default_factory=dict)
    constants: Mapping[str, np.ndarray] = field(default_factory=dict)

    def run(self, tensors: Tensors) -> np.ndarray:
        missing = np.zeros(0, np.int64)
        inputs = [
            self.constants[name] if name in self.constants else tensors[name] if name else missing
            for name in self.reads
        ]
        return np.asarray((MOVES.get(self.op) or SHAPES[self.op])(inputs, self.attributes))
