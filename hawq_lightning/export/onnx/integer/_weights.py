"""Weights and biases as integer kernels take them."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from hawq_lightning.export.onnx.integer._graph import Graph, Node
from hawq_lightning.export.onnx.integer._grids import Grid
from hawq_lightning.export.onnx.integer._operators import CLAMPS, weight_of

_LARGEST = 1 << 30  # of an INT32 bias, half of what it holds: sums are added to it
_BIAS = 2  # the bias is the third input


def transpose_weights(graph: Graph) -> None:
    """Keep weights that a Transpose reads as transposed codes, in place: MatMul takes them so."""
    makers, readers = graph.makers(), graph.readers()
    for node in list(graph.nodes):
        made = makers.get(node.input[0]) if node.op_type == "Transpose" else None
        if made is None or made.op_type != "DequantizeLinear" or not graph.is_constant(made.input[0]):
            continue
        if len(readers[made.output[0]]) > 1 or len(readers[made.input[0]]) > 1:
            continue
        codes = graph.array(made.input[0])
        order = list(graph.attribute(node, "perm", list(range(codes.ndim))[::-1]))
        axis = graph.attribute(made, "axis", 1)
        graph.constant(made.input[0], np.ascontiguousarray(codes.transpose(order)))
        turned = graph.add("DequantizeLinear", list(made.input), node.output[0], axis=order.index(axis))
        turned.name = made.name
        graph.drop([node, made])


def round_biases(graph: Graph, layers: Mapping[int, Node], grids: Mapping[tuple[int, int], Grid]) -> int:
    """INT32 biases of scale (input's times weight's), in place; returns how many.

    A Gemm without a grid behind it gets its bias added in float: QGemm of onnxruntime gives floats only without one.

    Where a channel's scale is so small (a BatchNorm with a gamma near 0) that its bias would not fit, the scale grows
    until it does: the codes then shrink, to zeros at last.
    """
    makers, count = graph.makers(), 0
    for node in layers.values():
        weight = weight_of(graph, makers, node)
        assert weight is not None
        codes, scale = graph.array(weight.input[0]), graph.array(weight.input[1]).reshape(-1)
        bias = graph.array(node.input[_BIAS]).reshape(-1) if len(node.input) > _BIAS and node.input[_BIAS] else None
        if bias is None:
            continue
        if node.op_type == "Gemm" and not _feeds_grid(graph, node):
            _add_float(graph, node)
            continue
        step = np.float32(grids[id(node), 0].scale)
        bias = np.broadcast_to(bias, scale.shape) if scale.size > 1 else bias
        least = (np.abs(bias).max() if scale.size == 1 else np.abs(bias)) / (float(step) * _LARGEST)
        if (small := np.abs(scale) < least).any():
            codes, scale = _coarser(codes, scale, np.where(small, least, 0), graph.attribute(weight, "axis", 1))
            weight = _own(graph, node, weight, codes, scale)
        product = step * scale
        name = f"{node.name}//bias"
        whole = np.round(bias.astype(np.float64) / np.where(product == 0, 1, product)).astype(np.int32)
        graph.constant(f"{name}/codes", whole)
        graph.constant(f"{name}/scale", product.astype(np.float32))
        zero = graph.constant(f"//zeros32/{scale.size}", np.zeros(scale.size, np.int32))
        graph.add("DequantizeLinear", [f"{name}/codes", f"{name}/scale", zero], name, axis=0)
        node.input[_BIAS] = name
        count += 1
    return count


def _feeds_grid(graph: Graph, node: Node) -> bool:
    readers = graph.readers()
    reads = readers[node.output[0]]
    clamped = len(reads) == 1 and reads[0][0].op_type in CLAMPS
    if clamped:
        reads = readers[reads[0][0].output[0]]
    if len(reads) != 1 or reads[0][0].op_type != "QuantizeLinear":
        return False
    return not clamped or not graph.array(reads[0][0].input[2])  # a grid from 0 does what a Relu does


def _add_float(graph: Graph, node: Node) -> None:
    result, bias = node.output[0], node.input[_BIAS]
    del node.input[_BIAS:]
    node.output[0] = f"{result}//without_bias"
    graph.add("Add", [node.output[0], bias], result)


def _coarser(codes: np.ndarray, scale: np.ndarray, least: np.ndarray, axis: int) -> tuple[np.ndarray, np.ndarray]:
    wider = np.where(np.abs(scale) < least, least, scale).astype(np.float32)
    shape = [-1 if i == axis else 1 for i in range(codes.ndim)]
    return np.round(codes * (scale / np.where(wider == 0, 1, wider)).reshape(shape)).astype(codes.dtype), wider


def _own(graph: Graph, node: Node, weight: Node, codes: np.ndarray, scale: np.ndarray) -> Node:
    """A layer's own DequantizeLinear, since others may share the old one."""
    own = graph.add(
        "DequantizeLinear", list(weight.input), f"{node.name}//weight", axis=graph.attribute(weight, "axis", 1)
    )
    own.input[0] = graph.constant(f"{weight.input[0]}//{node.name}", codes)
    own.input[1] = graph.constant(f"{node.name}//scale", scale)
    node.input[1] = own.output[0]
    return own
