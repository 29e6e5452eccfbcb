"""What has no integer kernel: it is named, and its weights are made float once, when the file is loaded."""

from __future__ import annotations

from typing import Any

import numpy as np

from hawq_lightning._extra import require
from hawq_lightning.export.onnx.integer._graph import Graph
from hawq_lightning.export.onnx.integer._operators import PRODUCTS


def float_weights(proto: Any, codes: set[str]) -> int:
    """Turn the DequantizeLinear of weights that stay float into Cast and Mul, in place, which runtimes fold.

    A DequantizeLinear is never folded while integer kernels are allowed: it would run in every call.

    Args:
        proto: the model.
        codes: tensors of codes of weights with integer kernels, which keep theirs.

    Returns:
        how many were.
    """
    graph, onnx = Graph(proto), require("onnx")
    makers, fixed = graph.makers(), _fixed(graph)
    count = 0
    for node in list(graph.nodes):
        if node.op_type != "DequantizeLinear" or node.input[0] in codes or node.input[0] not in fixed:
            continue
        scale = graph.array(node.input[1])
        axis = graph.attribute(node, "axis", 1)
        rank = _rank(graph, makers, node.input[0])
        name = f"{node.output[0]}//scale"
        graph.constant(name, scale.reshape([-1 if i == axis else 1 for i in range(rank)]).astype(np.float32))
        graph.add("Cast", [node.input[0]], f"{node.output[0]}//float", to=onnx.TensorProto.FLOAT)
        graph.add("Mul", [f"{node.output[0]}//float", name], node.output[0])
        graph.drop([node])
        count += 1
    graph.store()
    return count


def still_float(proto: Any) -> dict[str, str]:
    """Products of a finished integer file that run in float: node -> why."""
    graph = Graph(proto)
    makers, fixed = graph.makers(), _fixed(graph)
    found = {}
    for node in graph.nodes:
        if node.op_type not in (*PRODUCTS, "ConvTranspose", "GRU", "LSTM", "RNN"):
            continue
        sides = [makers.get(name) for name in node.input[:2]]
        on_grid = [side is not None and side.op_type == "DequantizeLinear" for side in sides]
        if node.op_type in PRODUCTS and all(on_grid):
            continue
        stored = any(name in fixed for name in node.input[:2])
        if node.op_type not in PRODUCTS:
            reason = f"onnxruntime has no integer kernel for {node.op_type}"
        elif not stored:
            reason = "a product of two activations, which have no grids"
        elif not on_grid[0]:
            reason = "it reads an activation without a grid"
        else:
            reason = "its weight has no INT8 codes"
        found[node.name or node.output[0]] = f"{node.op_type}: {reason}"
    return found


def _fixed(graph: Graph) -> set[str]:
    """Tensors that are computed from constants alone; nodes lie in an order in which they can run."""
    found = {t.name for t in graph.proto.graph.initializer} | {""}
    for node in graph.nodes:
        if node.input and all(name in found for name in node.input):
            found.update(node.output)
    return found


def _rank(graph: Graph, makers: dict[str, Any], name: str) -> int:
    """Axes of a tensor of codes, an initializer or reshaped."""
    return graph.array(name).ndim if graph.is_constant(name) else int(graph.array(makers[name].input[1]).size)
