"""Minima and maxima with a number as Clip, which runtimes merge into the product of integers in front of them.

torch 2.9 writes ``relu6`` as Relu and Min, and ``torch.minimum(x, number)`` is a Min in every version: behind a
convolution of integers each would leave an operator of floats.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from hawq_lightning._extra import require
from hawq_lightning.export.onnx._low_bits import read_by, replace_nodes


def clamps_as_clip(proto: Any) -> int:
    """Write every Min or Max of a tensor and a number as Clip, with the Relu in front of it, in place; how many."""
    onnx = require("onnx")
    numbers = {t.name: float(onnx.numpy_helper.to_array(t)) for t in proto.graph.initializer if _is_number(onnx, t)}
    reads = Counter(read_by(proto.graph.node))
    reads.update(value.name for value in proto.graph.output)
    relus = {n.output[0]: n for n in proto.graph.node if n.op_type == "Relu" and reads[n.output[0]] == 1}
    zero = onnx.helper.make_tensor("//clamp/0", onnx.TensorProto.FLOAT, [], [0.0])
    nodes, merged, count = [], set(), 0
    for node in proto.graph.node:
        number = next((n for n in node.input if n in numbers), None)
        if node.op_type not in ("Min", "Max") or len(node.input) != 2 or number is None:
            nodes.append(node)
            continue
        read = node.input[1] if node.input[0] == number else node.input[0]
        ends = [read, "", number] if node.op_type == "Min" else [read, number]
        if node.op_type == "Min" and read in relus and numbers[number] >= 0:
            merged.add(read)
            ends = [relus[read].input[0], zero.name, number]
        nodes.append(onnx.helper.make_node("Clip", ends, list(node.output), name=node.name))
        count += 1
    if count:
        replace_nodes(proto, [n for n in nodes if n.output[0] not in merged], [zero])
    return count


def _is_number(onnx: Any, tensor: Any) -> bool:
    return not tensor.dims and tensor.data_type == onnx.TensorProto.FLOAT
