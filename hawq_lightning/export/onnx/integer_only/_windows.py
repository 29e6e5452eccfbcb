"""Convolutions and sums over windows of integer arrays ``[N, C, positions ...]``, in integers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Window:
    """Where windows lie.

    Attributes:
        kernel: their size.
        strides: from one to the next.
        dilations: from one of their elements to the next.
        pads: before every axis, then behind every axis, as ONNX has them.
    """

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    pads: tuple[int, ...]

    def counts(self, size: Sequence[int]) -> list[int]:
        """How many there are along axes of a size."""
        dims = len(self.kernel)
        reach = [(k - 1) * d + 1 for k, d in zip(self.kernel, self.dilations)]
        whole = [n + self.pads[i] + self.pads[i + dims] for i, n in enumerate(size)]
        return [(n - r) // s + 1 for n, r, s in zip(whole, reach, self.strides)]

    def view(self, x: np.ndarray, fill: int = 0) -> np.ndarray:
        """``[N, C, windows ..., kernel ...]`` of ``[N, C, positions ...]``, padded with ``fill``."""
        dims = len(self.kernel)
        if any(self.pads):
            around = [(0, 0), (0, 0), *zip(self.pads[:dims], self.pads[dims:])]
            x = np.pad(x, around, constant_values=fill)
        reach = tuple((k - 1) * d + 1 for k, d in zip(self.kernel, self.dilations))
        axes = tuple(range(2, 2 + dims))
        found = np.lib.stride_tricks.sliding_window_view(x, reach, axis=axes)
        steps = (slice(None), slice(None), *(slice(None, None, s) for s in self.strides))
        inside = tuple(slice(None, None, d) for d in self.dilations)
        result: np.ndarray = found[(*steps, *inside)]
        return result


def convolve(x: np.ndarray, weight: np.ndarray, window: Window, groups: int) -> np.ndarray:
    """INT32 ``[N, C_out, windows ...]`` of INT32 ``[N, C, positions ...]``, 0 around.

    Args:
        x: INT32, zero point subtracted.
        weight: INT32 ``[C_out, C / groups, kernel ...]``.
        window: where its kernel lies.
        groups: that channels are divided into.
    """
    view = window.view(x)
    n, c, dims = len(x), x.shape[1], len(window.kernel)
    out = view.shape[2 : 2 + dims]
    # [N, C, out ..., kernel ...] -> [groups, C / groups * kernel, N * out]
    columns = view.transpose(1, *range(2 + dims, 2 + 2 * dims), 0, *range(2, 2 + dims))
    columns = columns.reshape(groups, c // groups * int(np.prod(window.kernel)), -1)
    rows = weight.reshape(groups, len(weight) // groups, -1)
    sums = np.einsum("gmk,gkp->gmp", rows, columns)  # 30 times faster than @, which is slow on integers
    result: np.ndarray = np.moveaxis(sums.reshape(len(weight), n, *out), 1, 0)
    return result


def window_of(kernel: Sequence[int], rank: int, attributes: dict[str, object], size: Sequence[int] | None) -> Window:
    """Windows of a node with ONNX's attributes of convolutions and pools.

    Args:
        kernel: size.
        rank: axes of positions.
        attributes: ``strides``, ``dilations``, ``pads``, ``auto_pad``, ``ceil_mode``.
        size: of the axes of positions; needed with ``auto_pad`` and ``ceil_mode``.

    Raises:
        ValueError: the size is needed and not known.
    """

    def numbers(name: str, default: int, count: int) -> tuple[int, ...]:
        value = attributes.get(name)
        return tuple(int(v) for v in value) if isinstance(value, (list, tuple)) else (default,) * count

    strides, dilations = numbers("strides", 1, rank), numbers("dilations", 1, rank)
    pads = list(numbers("pads", 0, 2 * rank))
    auto = attributes.get("auto_pad", b"NOTSET")
    auto = auto.decode() if isinstance(auto, bytes) else str(auto)
    same, ceil = auto.startswith("SAME"), bool(attributes.get("ceil_mode", 0))
    if auto == "VALID":
        pads = [0] * (2 * rank)
    if (same or ceil) and size is None:
        raise ValueError("its padding depends on the size of what it reads, which is free")
    for i in range(rank) if same or ceil else ():
        assert size is not None
        reach = (kernel[i] - 1) * dilations[i] + 1
        if same:
            missing = max(0, (-(-size[i] // strides[i]) - 1) * strides[i] + reach - size[i])
            pads[i] = (missing + (auto == "SAME_LOWER")) // 2
            pads[i + rank] = missing - pads[i]
        else:
            whole = size[i] + pads[i] + pads[i + rank] - reach
            last = -(-whole // strides[i])
            if last * strides[i] >= size[i] + pads[i]:  # a window that begins behind everything is none
                last -= 1
            pads[i + rank] = max(pads[i + rank], last * strides[i] + reach - size[i] - pads[i])
    return Window(tuple(kernel), strides, dilations, tuple(pads))
