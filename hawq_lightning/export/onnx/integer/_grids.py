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


def lift(graph: Graph) -> tuple[Reads, dict[str, Grid]]:
    """Take QuantizeLinear, Clip and DequantizeLinear of activations out, in place.

    Returns:
        which input of which node read by which grid; and tensors that whatever reads them reads by one grid, before
        any other, as those that the network was trained with at sums.
    """
    makers, readers = graph.makers(), graph.readers()
    found: Reads = {}
    own: dict[str, Grid] = {}
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
        read, result = codes.input[0], node.output[0]
        alone = read in makers and len(readers[read]) == 1 and readers[read][0][0] is codes
        if alone and result in graph.outputs:  # what makes it makes the output, which its codes will stand behind
            made = makers[read]
            made.output[:] = [result if o == read else o for o in made.output]
            read, makers[result] = result, made
        if alone:
            own[read] = grid
        for reader, slot in readers[result]:
            reader.input[slot] = read
            found[id(reader), slot] = grid
    graph.drop(gone)
    return found, own
