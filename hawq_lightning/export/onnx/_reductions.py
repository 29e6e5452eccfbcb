"""Reductions in front of a grid, in a form that OpenVINO computes right.

OpenVINO merges a quantization into the reduction in front of it (seen in 2026.4.1, in float32 too). Two results are
wrong then, without a word: maxima and minima that pass a grid with a zero point are off by up to half its range, and
means and sums that drop their axes behind a quantized product lose the grid. One elementwise node, or axes that are
dropped by a node of their own, keep the two apart; every value stays the same, in any runtime.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from hawq_lightning._extra import require
from hawq_lightning.export.onnx._low_bits import replace_nodes

_EXTREME = {"ReduceMax": "Max", "GlobalMaxPool": "Max", "ReduceMin": "Min"}
# what OpenVINO merges too, or looks through, between a reduction and a grid
_SEVERAL = frozenset({"Add", "Concat", "Div", "Mul", "Sub"})
_ONE = frozenset({"Abs", "Celu", "Clip", "Elu", "Erf", "Exp", "Gelu", "HardSigmoid", "HardSwish", "LeakyRelu", "Mish"})
_ALSO_ONE = frozenset({"Neg", "PRelu", "Relu", "Selu", "Sigmoid", "Softplus", "Sqrt", "Tanh"})
_SHAPES = frozenset({"Flatten", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze"})
_BETWEEN = _SEVERAL | _ONE | _ALSO_ONE | _SHAPES


def part_reductions(proto: Any) -> int:
    """Part every reduction from the grid that its result passes, in place; returns how many were parted."""
    onnx = require("onnx")
    gridded = _gridded(proto)
    nodes, more = [], {}
    count = 0
    for original in proto.graph.node:
        node = onnx.NodeProto.FromString(original.SerializeToString())
        nodes.append(node)
        if not (node.op_type.startswith("Reduce") or node.op_type in _EXTREME) or node.output[0] not in gridded:
            continue
        result = node.output[0]
        added = []
        extreme = _EXTREME.get(node.op_type)
        if extreme is not None:
            lowest = np.float32(np.finfo(np.float32).min if extreme == "Max" else np.finfo(np.float32).max)
            name = "lowest//float" if extreme == "Max" else "highest//float"  # no module or parameter can be called so
            more[name] = onnx.numpy_helper.from_array(np.array(lowest), name)
            added.append((extreme, name))
        keeps = next((a for a in node.attribute if a.name == "keepdims"), None)
        if keeps is not None and keeps.i == 0 and len(node.input) > 1 and node.input[1]:
            keeps.i = 1
            added.append(("Squeeze", node.input[1]))
        for operator, second in added:
            last = nodes[-1]
            last.output[0] = f"{result}//{'kept' if last is node else 'parted'}"
            nodes.append(
                onnx.helper.make_node(operator, [last.output[0], second], [result], name=f"{result}//{operator}")
            )
        count += bool(added)
    if count:
        replace_nodes(proto, nodes, list(more.values()))
    return count


def _gridded(proto: Any) -> set[str]:
    """Tensors that pass a QuantizeLinear, at once or behind elementwise nodes."""
    found: set[str] = set()
    for node in reversed(proto.graph.node):  # readers stand behind what they read
        if node.op_type == "QuantizeLinear" or (node.op_type in _BETWEEN and found.intersection(node.output)):
            several = node.op_type in _SEVERAL
            found.update(name for name in (node.input if several else node.input[:1]) if name)
    return found
