"""Keeping onnxruntime from rounding biases.

Its default optimizations turn the float bias of a quantized Conv or Gemm into INT32 whenever a QuantizeLinear follows,
even where no integer kernel is gained. That moves every activation a little and flips codes in every image. A bias
added by a node of its own stays float.
"""

from __future__ import annotations

from typing import Any

from hawq_lightning.export.extra import require

_BIAS = {"Conv": 2, "ConvTranspose": 2, "Gemm": 2}


def split_bias(proto: Any) -> int:
    """Move the bias of every layer with stored codes into an Add behind it, in place; returns how many."""
    onnx = require("onnx")
    stored = {t.name: t for t in proto.graph.initializer}
    made = {out: node for node in proto.graph.node for out in node.output}
    nodes, added = [], {}
    for node in proto.graph.node:
        nodes.append(node)
        place = _BIAS.get(node.op_type)
        if place is None or len(node.input) <= place or not node.input[place] or node.input[place] not in stored:
            continue
        weight = made.get(node.input[1])
        if weight is None or weight.op_type != "DequantizeLinear":
            continue
        bias = onnx.numpy_helper.to_array(stored[node.input[place]])
        if node.op_type != "Gemm":
            codes = stored.get(weight.input[0])
            if codes is None:
                continue
            bias = bias.reshape(1, -1, *[1] * (len(codes.dims) - 2))
        name = f"{node.input[place]}.added"
        added[name] = onnx.numpy_helper.from_array(bias, name)
        result = node.output[0]
        del node.input[place:]
        node.output[0] = f"{result}.without_bias"
        nodes.append(onnx.helper.make_node("Add", [node.output[0], name], [result], name=f"{node.name}.bias"))
    kept = [onnx.NodeProto.FromString(n.SerializeToString()) for n in nodes]
    del proto.graph.node[:]
    proto.graph.node.extend(kept)
    read = {name for node in kept for name in node.input}
    left = [t for t in proto.graph.initializer if t.name in read]
    left = [onnx.TensorProto.FromString(t.SerializeToString()) for t in left] + list(added.values())
    del proto.graph.initializer[:]
    proto.graph.initializer.extend(left)
    return len(added)
