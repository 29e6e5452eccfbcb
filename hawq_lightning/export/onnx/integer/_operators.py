"""What integer kernels there are, by operator."""

from __future__ import annotations

from collections.abc import Mapping

from hawq_lightning.export.onnx.integer._graph import Graph, Node

LAYERS = ("Conv", "Gemm")
"""With INT8 weights and INT32 biases: QLinearConv, QGemm."""
PRODUCTS = (*LAYERS, "MatMul")
"""MatMul gives float results from integer operands (MatMulIntegerToFloat), so that what follows needs no grid."""
JOINS = ("Add", "Mul", "Concat", "AveragePool", "GlobalAveragePool", "Sigmoid", "LeakyRelu")
"""All operands and the result lie on grids of their own."""
CLAMPS = ("Relu", "Clip")
"""Part of the grid behind them where its range is theirs."""
_MOVERS = ("MaxPool", "Reshape", "Flatten", "Transpose", "Slice", "Squeeze", "Unsqueeze", "Pad", "Gather", "Expand",
           "Identity", "Dropout", "DepthToSpace", "SpaceToDepth")  # fmt: skip


def moves(graph: Graph, node: Node) -> bool:
    """Whether a node only moves values, or takes the largest: it does the same to codes."""
    if node.op_type not in _MOVERS or len([o for o in node.output if o]) != 1 or graph.is_constant(node.input[0]):
        return False
    if node.op_type == "Pad":
        padded = len(node.input) < 3 or not node.input[2]
        return padded or (graph.is_constant(node.input[2]) and float(graph.array(node.input[2])) == 0)
    return True


def weight_of(graph: Graph, makers: Mapping[str, Node], node: Node) -> Node | None:
    """The DequantizeLinear of a product's weight."""
    if node.op_type not in PRODUCTS or len(node.input) < 2:
        return None
    made = makers.get(node.input[1])
    stored = made is not None and made.op_type == "DequantizeLinear" and graph.is_constant(made.input[0])
    return made if stored else None
