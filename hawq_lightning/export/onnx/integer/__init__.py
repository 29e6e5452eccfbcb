"""Rewriting an exported graph so that integer kernels compute all that they can.

onnxruntime makes a QLinearConv of ``DequantizeLinear(x), DequantizeLinear(w), DequantizeLinear(b) -> Conv -> [Relu] ->
QuantizeLinear`` where x is UINT8, w INT8 with explicit zeros and b INT32 of scale (x's times w's). One float tensor in
a residual block undoes the gain of it all, so sums and pools get grids of 8 bits of their own, over the range that
example batches show. Weights' codes, scales (negative ones too) and the plan's grids stay what they are.
"""

from hawq_lightning.export.onnx.integer._graph import Graph, Node
from hawq_lightning.export.onnx.integer._leftovers import float_weights, still_float
from hawq_lightning.export.onnx.integer._operators import LAYERS
from hawq_lightning.export.onnx.integer._rewrite import Rewritten, to_integers

__all__ = ["LAYERS", "Graph", "Node", "Rewritten", "float_weights", "still_float", "to_integers"]
