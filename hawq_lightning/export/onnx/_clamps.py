"""Minima and maxima with a number as Clip, which runtimes merge into the product of integers in front of them.

torch 2.9 writes ``relu6`` as Relu and Min, and ``torch.minimum(x, number)`` is a Min in every version: behind a
convolution of integers each would leave an operator of floats.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from hawq_lightning._extra import require
from hawq_lightning.export.onnx._low_bits import replace_nodes


def clamps_as_clip(proto: Any) -> int:
    """Write every Min or Max of a tensor and a number as Clip, with the Relu in front of it, in place; how many."""
    onnx = require("onnx")
    stored = {t.name: t for t in proto.graph.initializer}
    readers = Counter(name for node in proto.graph.node for name in node.input)
    readers.update(value.name for value in proto.graph.output)
    nodes: list[Any] = []
    relus: dict[str, int] = {}  # where in the list, by result
    zero = onnx.helper.make_tensor("//clamp/0", onnx.TensorProto.FLOAT, [], [0.0])
    count = 0
    for node in proto.graph.node:
        number = next((n for n in node.input if n in stored and _is_number(onnx, stored[n])), None)
        if node.op_type not in ("Min", "Max") or len(node.input) != 2 or number is None:
            if node.op_type == "Relu" and readers[node.output[0]] == 1:
                relus[node.output[0]] = len(nodes)
            nodes.append(node)
            continue
        read = node.input[1] if node.input[0] == number else node.input[0]
        ends = [read, "", number] if node.op_type == "Min" else [read, number]
        if node.op_type == "Min" and read in relus and float(onnx.numpy_helper.to_array(stored[number])) >= 0:
            relu = nodes[relus[read]]
            nodes[relus[read]] = None
            ends = [relu.input[0], zero.name, number]
        nodes.append(onnx.helper.make_node("Clip", ends, list(node.output), name=node.name))
        count += 1
    if count:
        replace_nodes(proto, [n for n in nodes if n is not None], [zero])
    return count


def _is_number(onnx: Any, tensor: Any) -> bool:
    return not tensor.dims and tensor.data_type == onnx.TensorProto.FLOAT
