"""Means over all positions as GlobalAveragePool, which has an integer kernel where ReduceMean has none."""

from __future__ import annotations

import numpy as np

from hawq_lightning._extra import require
from hawq_lightning.export.onnx.integer._graph import Graph


def pool_means(graph: Graph) -> int:
    """Rewrite every ReduceMean over all axes behind the channels, in place; returns how many."""
    onnx = require("onnx")
    means = [n for n in graph.nodes if n.op_type == "ReduceMean" and len(n.input) > 1 and graph.is_constant(n.input[1])]
    if not means:
        return 0
    shapes = onnx.shape_inference.infer_shapes(graph.proto).graph
    ranks = {v.name: len(v.type.tensor_type.shape.dim) for v in (*shapes.value_info, *shapes.input)}
    count = 0
    for node in means:
        rank = ranks.get(node.input[0], 0)
        axes = sorted(int(a) % rank for a in graph.array(node.input[1]).reshape(-1)) if rank else []
        if rank < 3 or axes != list(range(2, rank)):
            continue
        pooled = node.output[0]
        if not graph.attribute(node, "keepdims", 1):
            pooled = f"{node.output[0]}//pooled"
            graph.constant("//spatial/" + str(rank), np.arange(2, rank))
            graph.add("Squeeze", [pooled, f"//spatial/{rank}"], node.output[0])
        graph.add("GlobalAveragePool", [node.input[0]], pooled)
        graph.drop([node])
        count += 1
    return count
