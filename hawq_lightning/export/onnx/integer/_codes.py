"""Putting grids into a graph: codes behind what is computed, movers on codes, floats where codes are read."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from hawq_lightning.export.onnx.integer._coded import Coded, Values
from hawq_lightning.export.onnx.integer._graph import Graph, Node
from hawq_lightning.export.onnx.integer._grids import TOP, Grid
from hawq_lightning.export.onnx.integer._operators import moves


class Codes:
    """Writes the grids of decided values.

    Args:
        graph: without grids.
        coded: what was decided of it.
    """

    def __init__(self, graph: Graph, coded: Coded) -> None:
        self.graph, self.coded = graph, coded
        self._read: dict[tuple[str, Grid], str] = {}

    def write(self, calibrated: Mapping[str, Grid]) -> None:
        """Put all grids in.

        Args:
            calibrated: root -> grid, of the values that the plan has none for.
        """
        for values in self.coded.values:
            if not values.coded:
                continue
            grid = values.grid or calibrated[values.root]
            self._clamp(values, grid)
            self._keep(values, grid)
        for values in self.coded.values:
            if not values.coded:
                for node, slot in values.reads:
                    own = self.coded.plan.get((id(node), slot))
                    if own is None and id(node) in self.coded.joins:
                        own = calibrated[values.root]
                    if own is not None:
                        node.input[slot] = self._snapped(node.input[slot], own)

    def _clamp(self, values: Values, grid: Grid) -> None:
        """Leave to the grid what it does; a clamp that it does not do gets the same grid in front, too.

        That changes nothing: rounding keeps the order of numbers, so of what lies beyond the clamp's ends nothing comes
        to lie between them.
        """
        clamp, source = self.coded.clamp(values), self.coded.source(values)
        if clamp is None or source is None:
            return
        if clamp.op_type == "Clip" and self._does(grid, clamp):
            made = self.graph.makers()[clamp.input[0]]
            made.output[:] = [values.root if o == clamp.input[0] else o for o in made.output]
            self.graph.drop([clamp])
        elif source.op_type != "Gemm" and (clamp.op_type == "Clip" or grid.zero):
            clamp.input[0] = self._snapped(clamp.input[0], grid)

    def _does(self, grid: Grid, clip: Node) -> bool:
        low, high = (
            float(self.graph.array(clip.input[i])) if len(clip.input) > i and clip.input[i] else sign * math.inf
            for i, sign in ((1, -1), (2, 1))
        )
        below = low == -math.inf or grid.code(low) <= 0
        return below and (high == math.inf or grid.code(high) >= grid.top)

    def _keep(self, values: Values, grid: Grid) -> None:
        makers = self.graph.makers()
        shown = {m for m in values.members if m in self.graph.outputs}
        raw = values.root
        if raw in shown:
            raw = f"{values.root}//float"
            makers[values.root].output[:] = [raw if o == values.root else o for o in makers[values.root].output]
        codes = {values.root: self._quantize(raw, grid, f"{values.root}//codes")}
        for name in values.members[1:]:
            mover = makers[name]
            assert moves(self.graph, mover)
            codes[name] = f"{name}//codes"
            mover.output[0] = codes[name]
            mover.input[0] = f"{mover.input[0]}//codes"
            if mover.op_type == "Pad":
                zero = self._number("zero", grid.zero)
                mover.input[:] = [*list(mover.input[:2]), zero, *list(mover.input[3:])]
        on_grid = {m: m for m in shown}
        for name in shown:
            self._dequantize(codes[name], grid, name)
        for node, slot in values.reads:
            name = node.input[slot]
            if node.op_type == "Shape" or slot < 0 or name not in codes:
                if name in codes:
                    node.input[slot] = codes[name]
                continue
            if name not in on_grid:
                on_grid[name] = self._dequantize(codes[name], grid, f"{name}//read")
            own = self.coded.plan.get((id(node), slot), grid)
            node.input[slot] = on_grid[name] if own == grid else self._snapped(on_grid[name], own)

    def _snapped(self, tensor: str, grid: Grid) -> str:
        """A tensor read by a grid, written once for all that read it so."""
        if (tensor, grid) not in self._read:
            name = f"{tensor}//by{sum(t == tensor for t, _ in self._read)}"
            self._read[tensor, grid] = self._dequantize(self._quantize(tensor, grid, f"{name}//codes"), grid, name)
        return self._read[tensor, grid]

    def _quantize(self, tensor: str, grid: Grid, codes: str) -> str:
        scale, zero = self._step(grid), self._number("zero", grid.zero)
        if grid.top == TOP:
            self.graph.add("QuantizeLinear", [tensor, scale, zero], codes)
            return codes
        self.graph.add("QuantizeLinear", [tensor, scale, zero], f"{codes}//wide")
        self.graph.add("Clip", [f"{codes}//wide", self._number("zero", 0), self._number("zero", grid.top)], codes)
        return codes

    def _dequantize(self, codes: str, grid: Grid, name: str) -> str:
        self.graph.add("DequantizeLinear", [codes, self._step(grid), self._number("zero", grid.zero)], name)
        return name

    def _step(self, grid: Grid) -> str:
        step = np.float32(grid.scale)
        return self.graph.constant(f"//step/{step.view(np.uint32):x}", np.asarray(step))

    def _number(self, kind: str, value: int) -> str:
        return self.graph.constant(f"//{kind}/{value}", np.asarray(value, np.uint8))
