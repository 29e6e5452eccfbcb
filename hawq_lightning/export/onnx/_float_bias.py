"""Keeping onnxruntime from rounding biases.

Its default optimizations turn the float bias of a quantized Conv or Gemm into INT32 whenever a QuantizeLinear follows,
even where no integer kernel is gained. That moves every activation a little and flips codes in every image. A bias
added by a node of its own stays float.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from typing import Any

import numpy as np

from hawq_lightning._extra import require
from hawq_lightning.export.onnx._low_bits import replace_nodes
from hawq_lightning.layers import LayerKind, kinds

_BIAS = 2  # the bias is their third input


def split_bias(proto: Any, layers: Container[str]) -> int:
    """Move biases into an Add behind their layer, in place; a layer without a bias gets an Add of zeros.

    The zeros keep onnxruntime from making a QLinearConv of the layer, which rounds and, for INT2, does not exist. It
    finds the QuantizeLinear through whatever only moves values: pooling of maxima, reshaping, a ReLU that the grid
    clips anyway. So every layer gets its Add, whatever follows.

    Args:
        proto: an ONNX model.
        layers: names of the codes' initializers of the layers to treat.

    Returns:
        how many were.
    """
    onnx = require("onnx")
    stored = {t.name: t for t in proto.graph.initializer}
    made = {out: node for node in proto.graph.node for out in node.output}
    nodes, added = [], {}
    for node in proto.graph.node:
        nodes.append(node)
        codes = _codes(node, made)
        if codes not in layers or codes not in stored:
            continue
        dims = stored[codes].dims
        shape = [1, -1] + [1] * (len(dims) - 2)
        if len(node.input) > _BIAS and node.input[_BIAS] in stored:
            bias = onnx.numpy_helper.to_array(stored[node.input[_BIAS]]).reshape(shape)
        elif len(node.input) <= _BIAS:
            bias = np.zeros(_channels(node, dims), np.float32).reshape(shape)
        else:
            continue
        result = node.output[0]
        name = f"{result}//bias"  # no module or parameter can be called so
        added[name] = onnx.numpy_helper.from_array(bias, name)
        del node.input[_BIAS:]
        node.output[0] = f"{result}.without_bias"
        nodes.append(onnx.helper.make_node("Add", [node.output[0], name], [result], name=f"{node.name}.bias"))
    replace_nodes(proto, nodes, list(added.values()))
    return len(added)


def _channels(node: Any, dims: Sequence[int]) -> int:
    """Output channels of a layer without a bias; a Gemm may read a weight ``[in, out]``, as GPT-2's."""
    attributes, kind = {a.name: a.i for a in node.attribute}, _kind(node)
    assert kind is not None
    if node.op_type == "Gemm" and not attributes.get("transB", 0):
        return dims[1]
    return kind.onnx_channels(dims, attributes.get("group", 1))


def _kind(node: Any) -> LayerKind | None:
    return next((kind for kind in kinds() if kind.onnx_op == node.op_type), None)


def _codes(node: Any, made: Mapping[str, Any]) -> str:
    """The initializer of the codes that a layer's weight comes from."""
    if _kind(node) is None:
        return ""
    weight = made.get(node.input[1])
    if weight is not None and weight.op_type == "Add":
        weight = made.get(weight.input[0])
    return weight.input[0] if weight is not None and weight.op_type == "DequantizeLinear" else ""
