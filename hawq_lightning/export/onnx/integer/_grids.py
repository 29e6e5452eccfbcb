"""Grids of activations: taken out of a graph, so that it computes in float again, and kept beside it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hawq_lightning.export.onnx.integer._graph import Graph, Node

TOP = 255  # of UINT8 codes


@dataclass(frozen=True)
class Grid:
    """``(code - zero) * scale`` for codes 0 to ``top``."""

    scale: float
    zero: int
    top: int = TOP

    def code(self, value: float) -> int:
        """Of a value, not clipped."""
        return round(value / self.scale) + self.zero

    @classmethod
    def over(cls, low: float, high: float) -> Grid:
        """The grid of 8 bits over a range, zero on it."""
        low, high = min(low, 0.0), max(high, 0.0)
        scale = float(np.float32(max((high - low) / TOP, 1e-8)))
        return cls(scale, min(TOP, max(0, round(-low / scale))))


Reads = dict[tuple[int, int], Grid]
"""(``id`` of a node, which of its inputs) -> the grid that it reads by."""


def lift(graph: Graph) -> Reads:
    """Take QuantizeLinear, Clip and DequantizeLinear of activations out, in place.

    Returns:
        which input of which node read by which grid.
    """
    makers, readers = graph.makers(), graph.readers()
    found: Reads = {}
    gone: list[Node] = []
    for node in graph.nodes:
        if node.op_type != "DequantizeLinear":
            continue
        codes, between, top = makers.get(node.input[0]), [], TOP
        if codes is not None and codes.op_type == "Clip":
            between, top = [codes], int(graph.array(codes.input[2]))
            codes = makers.get(codes.input[0])
        if codes is None or codes.op_type != "QuantizeLinear":
            continue
        gone += [node, *between, codes]
        grid = Grid(float(graph.array(codes.input[1])), int(graph.array(codes.input[2])), top)
        for reader, slot in readers[node.output[0]]:
            reader.input[slot] = codes.input[0]
            found[id(reader), slot] = grid
    graph.drop(gone)
    return found
