"""Operators that move integers around, or compute with shapes: in numpy, as ONNX defines them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from hawq_lightning.export.onnx.integer_only._windows import window_of

Attributes = Mapping[str, object]
Arrays = Sequence[np.ndarray]


def _ints(value: object) -> list[int]:
    return [int(v) for v in np.asarray(value).reshape(-1)]


def _axes(x: Arrays, a: Attributes) -> list[int] | None:
    """Of an operator whose axes are its second input, or all."""
    return _ints(x[1]) if len(x) > 1 else _ints(a["axes"]) if "axes" in a else None


def _number(a: Attributes, name: str, default: int) -> int:
    value = a.get(name, default)
    assert isinstance(value, int)
    return value


def _reshape(x: Arrays, a: Attributes) -> np.ndarray:
    shape = _ints(x[1])
    if not a.get("allowzero"):
        shape = [x[0].shape[i] if s == 0 else s for i, s in enumerate(shape)]
    return x[0].reshape(shape)


def _flatten(x: Arrays, a: Attributes) -> np.ndarray:
    axis = _number(a, "axis", 1) % (x[0].ndim + 1)
    return x[0].reshape(int(np.prod(x[0].shape[:axis])), -1)


def _transpose(x: Arrays, a: Attributes) -> np.ndarray:
    return x[0].transpose(_ints(a["perm"]) if "perm" in a else None)


def _slice(x: Arrays, a: Attributes) -> np.ndarray:
    starts, ends = _ints(x[1]), _ints(x[2])
    axes = _ints(x[3]) if len(x) > 3 and x[3].size else list(range(len(starts)))
    steps = _ints(x[4]) if len(x) > 4 else [1] * len(starts)
    cut = [slice(None)] * x[0].ndim
    for start, end, axis, step in zip(starts, ends, axes, steps):
        last = end if step > 0 or end >= -x[0].shape[axis] else None
        cut[axis] = slice(start, last, step)
    return x[0][tuple(cut)]


def _squeeze(x: Arrays, a: Attributes) -> np.ndarray:
    axes = _axes(x, a)
    return np.squeeze(x[0], None if axes is None else tuple(axes))


def _unsqueeze(x: Arrays, a: Attributes) -> np.ndarray:
    return np.expand_dims(x[0], tuple(_axes(x, a) or ()))


def _pad(x: Arrays, a: Attributes) -> np.ndarray:
    pads = _ints(x[1])
    axes = _ints(x[3]) if len(x) > 3 and x[3].size else list(range(x[0].ndim))
    widths = [(0, 0)] * x[0].ndim
    for i, axis in enumerate(axes):
        widths[axis] = (pads[i], pads[i + len(axes)])
    cut = tuple(slice(max(0, -low), n - max(0, -high)) for n, (low, high) in zip(x[0].shape, widths))
    around = [(max(0, low), max(0, high)) for low, high in widths]
    fill = int(x[2]) if len(x) > 2 and x[2].size else 0
    return np.pad(x[0][cut], around, constant_values=fill)


def _gather(x: Arrays, a: Attributes) -> np.ndarray:
    return np.take(x[0], x[1], axis=_number(a, "axis", 0))


def _expand(x: Arrays, a: Attributes) -> np.ndarray:
    return np.broadcast_to(x[0], np.broadcast_shapes(x[0].shape, tuple(_ints(x[1]))))


def _concat(x: Arrays, a: Attributes) -> np.ndarray:
    return np.concatenate(list(x), axis=_number(a, "axis", 0))


def _shape(x: Arrays, a: Attributes) -> np.ndarray:
    end = a.get("end")
    assert end is None or isinstance(end, int)
    return np.asarray(x[0].shape[_number(a, "start", 0) : end], np.int64)


def _max_pool(x: Arrays, a: Attributes) -> np.ndarray:
    kernel = _ints(a["kernel_shape"])
    window = window_of(kernel, len(kernel), dict(a), x[0].shape[2:])
    view = window.view(x[0], int(np.iinfo(x[0].dtype).min))
    return np.asarray(view.max(tuple(range(-len(kernel), 0))))


def _depth_to_space(x: Arrays, a: Attributes) -> np.ndarray:
    n, c, h, w = x[0].shape
    b = _number(a, "blocksize", 1)
    if a.get("mode") == b"CRD":
        return x[0].reshape(n, c // b**2, b, b, h, w).transpose(0, 1, 4, 2, 5, 3).reshape(n, c // b**2, h * b, w * b)
    return x[0].reshape(n, b, b, c // b**2, h, w).transpose(0, 3, 4, 1, 5, 2).reshape(n, c // b**2, h * b, w * b)


def _space_to_depth(x: Arrays, a: Attributes) -> np.ndarray:
    n, c, h, w = x[0].shape
    b = _number(a, "blocksize", 1)
    return x[0].reshape(n, c, h // b, b, w // b, b).transpose(0, 3, 5, 1, 2, 4).reshape(n, c * b**2, h // b, w // b)


MOVES: dict[str, Callable[[Arrays, Attributes], np.ndarray]] = {
    "Concat": _concat,
    "DepthToSpace": _depth_to_space,
    "Dropout": lambda x, a: x[0],
    "Expand": _expand,
    "Flatten": _flatten,
    "Gather": _gather,
    "Identity": lambda x, a: x[0],
    "MaxPool": _max_pool,
    "Pad": _pad,
    "Reshape": _reshape,
    "Shape": _shape,
    "Slice": _slice,
    "SpaceToDepth": _space_to_depth,
    "Squeeze": _squeeze,
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
}
"""The same for codes and for shapes; ``x`` are the inputs, missing optional ones as empty arrays."""

SHAPES: dict[str, Callable[[Arrays, Attributes], np.ndarray]] = {
    "Add": lambda x, a: x[0] + x[1],
    "Sub": lambda x, a: x[0] - x[1],
    "Mul": lambda x, a: x[0] * x[1],
    "Div": lambda x, a: np.asarray(np.trunc(x[0] / x[1]), np.int64),
    "Cast": lambda x, a: x[0].astype(np.int64),
}
"""Of INT64 numbers of axes alone."""
