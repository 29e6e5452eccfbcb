"""The decision of :mod:`hawq_lightning._integer_form` about a graph, and by what grids its tensors are read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from hawq_lightning._integer_form import IntegerForm, Kind, Operation, Value
from hawq_lightning.export.onnx.integer._graph import Graph, Node, Read
from hawq_lightning.export.onnx.integer._grids import TOP, Grid, Reads
from hawq_lightning.export.onnx.integer._operators import CLAMPS, JOINS, LAYERS, moves, weight_of


@dataclass
class Values:
    """A tensor and all that hold the same values moved around: they lie on one grid or on none.

    Attributes:
        root: the tensor that is computed.
        members: it and the moved ones.
        reads: where a member is computed with, or its shape asked for.
        coded: whether it is kept as codes.
        grids: those that the plan lets it be read by, each once.
        grid: that its codes are of; ``None``: to be calibrated.
    """

    root: str
    members: list[str]
    reads: list[Read]
    coded: bool
    grids: list[Grid] = field(default_factory=list)
    grid: Grid | None = None


class Coded:
    """What of a graph without grids is kept as codes.

    Args:
        graph: after :func:`lift`.
        plan: which input of which node read by which grid.
        own: tensors that are read by one grid before any other.
    """

    def __init__(self, graph: Graph, plan: Reads, own: Mapping[str, Grid]) -> None:
        self.graph, self.plan = graph, plan
        self._makers, self._readers = graph.makers(), graph.readers()
        self.layers = {id(n): n for n in graph.nodes if self._is_layer(n)}
        for node in graph.nodes:
            if moves(graph, node):
                self._pass_on(node)
        self._inside: dict[int, list[str]] = {}  # what loops and branches inside of a node read
        for name, reads in self._readers.items():
            for node, slot in reads:
                if slot < 0:
                    self._inside.setdefault(id(node), []).append(name)
        self._form = IntegerForm([self._operation(n) for n in graph.nodes], graph.inputs, graph.outputs)
        self.joins = {id(o.about): o.about for o in self._form.joins}
        self.values = [self._values(v) for v in self._form.values]
        self._decided = {str(v.root): v for v in self._form.values}
        self._of = {m: v for v in self.values for m in v.members}
        for v in self.values:
            v.coded = v.coded or v.root in own
            v.grid = own.get(v.root, self._common(v)) if v.coded else None

    def of(self, tensor: str) -> Values | None:
        """The values that a tensor holds; ``None`` for constants."""
        return self._of.get(tensor)

    def clamp(self, values: Values) -> Node | None:
        """The Relu or Clip that makes the root from what nothing else reads."""
        made = self._form.clamp(self._decided[values.root])
        return None if made is None else made.about

    def source(self, values: Values) -> Node | None:
        """The node with integer kernels that makes the root, directly or before its clamp."""
        made = self._form.source(self._decided[values.root])
        return None if made is None else made.about

    def by_grid(self, node: Node, slot: int) -> bool:
        """Whether a node reads codes."""
        return (id(node), slot) in self.plan or id(node) in self.joins

    def _is_layer(self, node: Node) -> bool:
        weight = weight_of(self.graph, self._makers, node)
        if node.op_type not in LAYERS or weight is None or (id(node), 0) not in self.plan:
            return False
        plain = node.op_type == "Conv" or all(self.graph.attribute(node, k, 1.0) == 1.0 for k in ("alpha", "beta"))
        bias = node.input[2] if len(node.input) > 2 else ""
        stored = not bias or self.graph.is_constant(bias)
        return plain and stored and self.graph.array(weight.input[0]).dtype.itemsize == 1

    def _pass_on(self, node: Node) -> None:
        """What a mover read by a grid, its readers read by it."""
        grid = self.plan.pop((id(node), 0), None)
        if grid is None:
            return
        for reader, slot in self._readers.get(node.output[0], ()):
            self.plan.setdefault((id(reader), slot), grid)
            if slot == 0 and moves(self.graph, reader):
                self._pass_on(reader)

    def _operation(self, node: Node) -> Operation:
        read = (*node.input, *self._inside.get(id(node), ()))
        reads = tuple(n if n and not self.graph.is_constant(n) else None for n in read)
        by_grid = [s for s in range(len(node.input)) if (id(node), s) in self.plan]
        return Operation(self._kind(node), reads, tuple(o for o in node.output if o), by_grid, node)

    def _kind(self, node: Node) -> Kind:
        if id(node) in self.layers:
            return Kind.CONVOLUTION if node.op_type == "Conv" else Kind.MATRIX
        if node.op_type in CLAMPS:
            return Kind.CLAMP
        if node.op_type == "Shape":
            return Kind.SHAPE
        if moves(self.graph, node):
            return Kind.MOVE
        return Kind.JOIN if node.op_type in JOINS else Kind.OTHER

    def _values(self, value: Value) -> Values:
        reads = [(o.about, s if s < len(o.about.input) else -1) for o, s in value.reads]  # type: ignore[attr-defined]
        grids = [self.plan[key] for n, s in reads if (key := (id(n), s)) in self.plan]
        members = [str(m) for m in value.members]
        return Values(str(value.root), members, reads, value.coded, list(dict.fromkeys(grids)))

    def _common(self, values: Values) -> Grid | None:
        whole = [g for g in values.grids if g.top == TOP]
        others = any((id(n), s) not in self.plan and n.op_type != "Shape" for n, s in values.reads)
        others |= any(m in self.graph.outputs for m in values.members)
        if len(values.grids) == 1 and (whole or not others):
            return values.grids[0]
        return min(whole, key=lambda g: abs(g.scale), default=None)
