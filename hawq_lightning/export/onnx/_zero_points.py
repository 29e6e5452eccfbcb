"""Explicit zero points of weights: without them onnxruntime 1.18 to 1.26 refuses files with linear layers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from hawq_lightning._extra import require
from hawq_lightning.export.onnx._low_bits import weights

_ZERO = 2  # the third input of a DequantizeLinear


def add_zero_points(proto: Any, kinds: Mapping[str, int] | None = None) -> int:
    """Give every DequantizeLinear that has none zeros of its codes' type, one a scale, in place.

    ONNX calls them optional, but before 1.28 onnxruntime makes a QGemm or a QLinearMatMul of such a layer and then
    complains that the shapes or types of its parts do not fit. INT2 gets none: with zeros onnxruntime 1.32 makes a
    QGemm of it, which has no two bits, and versions before 1.28 do not know the type anyway.

    Args:
        proto: an ONNX model.
        kinds: tensor of codes -> its type; ``None``: of the initializers that hold them.

    Returns:
        how many were added.
    """
    kinds = {t.name: t.data_type for t in weights(proto)} if kinds is None else kinds
    two_bits = getattr(require("onnx").TensorProto, "INT2", None)
    stored = {t.name: t for t in proto.graph.initializer}
    count = 0
    for node in proto.graph.node:
        if node.op_type != "DequantizeLinear" or len(node.input) > _ZERO or node.input[0] not in kinds:
            continue
        if kinds[node.input[0]] == two_bits:
            continue
        node.input.append(zeros(proto, kinds[node.input[0]], list(stored[node.input[1]].dims)))
        count += 1
    return count


def zeros(proto: Any, kind: int, dims: list[int]) -> str:
    """Name of an initializer of zeros, added where there is none of this type and shape."""
    onnx = require("onnx")
    label = onnx.TensorProto.DataType.Name(kind)
    name = "//".join(("zeros", label, *map(str, dims)))  # no module or parameter can be called so
    if all(t.name != name for t in proto.graph.initializer):
        bits = int(label.removeprefix("U").removeprefix("INT"))
        raw = np.zeros((math.prod(dims) * bits + 7) // 8, np.uint8).tobytes()
        proto.graph.initializer.append(onnx.helper.make_tensor(name, kind, dims, raw, raw=True))
    return name
