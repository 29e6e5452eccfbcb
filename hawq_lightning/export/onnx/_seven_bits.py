"""Weights of at most 7 bits, whose products no kernel without VNNI lets saturate.

On x86 with AVX2 alone onnxruntime adds two products of UINT8 and INT8 in 16 bits: 2 * 255 * 127 does not fit,
2 * 255 * 64 does (its documentation's ``reduce_range``).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from hawq_lightning._extra import require
from hawq_lightning.export.onnx._low_bits import replace_nodes, weights

_LEAST, _MOST = -64, 63


def at_most_seven_bits(proto: Any) -> tuple[str, ...]:
    """Halve codes outside of -64 to 63 and double their scales, in place; half codes go to the even one.

    Args:
        proto: an ONNX model whose codes are INT8 initializers; wider ones have no integer kernel and stay.

    Returns:
        names of the weights that were halved.
    """
    onnx = require("onnx")
    stored = {t.name: t for t in proto.graph.initializer}
    wide = {}
    for tensor in weights(proto):
        codes = onnx.numpy_helper.to_array(tensor)
        if codes.dtype == np.int8 and codes.size and not (codes.min() >= _LEAST and codes.max() <= _MOST):
            wide[tensor.name] = np.clip(np.rint(codes / 2), _LEAST, _MOST).astype(np.int8)
    added = {}
    for name, codes in wide.items():
        stored[name].CopyFrom(onnx.numpy_helper.from_array(codes, name))
    for node in proto.graph.node:
        if node.op_type == "DequantizeLinear" and node.input[0] in wide:
            scale = 2 * onnx.numpy_helper.to_array(stored[node.input[1]])
            node.input[1] = f"{node.input[1]}//doubled"  # others may share the old one
            added[node.input[1]] = onnx.numpy_helper.from_array(scale, node.input[1])
    replace_nodes(proto, proto.graph.node, list(added.values()))
    return tuple(name.removesuffix(".codes").removesuffix(".weight_quantizer") for name in wide)
