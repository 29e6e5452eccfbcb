"""Which tensors of a float graph lie on a grid, and by what grids they are read."""

from __future__ import annotations

from dataclasses import dataclass, field

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
        grids: those that the plan lets it be read by, each once.
        grid: that its codes are of; ``None``: to be calibrated.
        coded: whether it is kept as codes.
    """

    root: str
    members: list[str] = field(default_factory=list)
    reads: list[Read] = field(default_factory=list)
    grids: list[Grid] = field(default_factory=list)
    grid: Grid | None = None
    coded: bool = False


class Coded:
    """Decides for a graph without grids.

    A convolution's result is always kept as codes: its kernel gives nothing else. A sum, product, concatenation or
    pooling is computed on codes where one operand comes from integer kernels and something reads the result by a grid.
    A residual stream that normalizations read stays float so.

    Args:
        graph: after :func:`lift`.
        plan: which input of which node read by which grid.
    """

    def __init__(self, graph: Graph, plan: Reads) -> None:
        self.graph, self.plan = graph, plan
        self._makers, self._readers = graph.makers(), graph.readers()
        self.layers = {id(n): n for n in graph.nodes if self._is_layer(n)}
        self.values = self._gather()
        self._of = {m: v for v in self.values for m in v.members}
        self.joins = self._joins()
        for v in self.values:
            v.coded = self._is_coded(v)
            v.grid = self._common(v) if v.coded else None

    def of(self, tensor: str) -> Values | None:
        """The values that a tensor holds; ``None`` for constants."""
        return self._of.get(tensor)

    def clamp(self, values: Values) -> Node | None:
        """The Relu or Clip that makes the root from what nothing else reads."""
        node = self._makers.get(values.root)
        if node is None or node.op_type not in CLAMPS or len(self._readers[node.input[0]]) > 1:
            return None
        return None if node.input[0] in self.graph.outputs else node

    def source(self, values: Values) -> Node | None:
        """The node with integer kernels that makes the root, directly or before its clamp."""
        clamp = self.clamp(values)
        node = self._makers.get(values.root if clamp is None else clamp.input[0])
        return node if node is not None and (id(node) in self.layers or id(node) in self.joins) else None

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

    def _gather(self) -> list[Values]:
        found: dict[str, Values] = {}
        of: dict[str, Values] = {}
        for name in (*self.graph.inputs, *(o for n in self.graph.nodes for o in n.output if o)):
            root = name
            while (made := self._makers.get(root)) is not None and moves(self.graph, made):
                root = made.input[0]
            of[name] = found.setdefault(root, Values(root))
            of[name].members.append(name)
        for name, values in of.items():
            for node, slot in self._readers.get(name, ()):
                if slot == 0 and moves(self.graph, node):
                    self._pass_on(node)
                else:
                    values.reads.append((node, slot))
        for values in found.values():
            grids = [self.plan[key] for n, s in values.reads if (key := (id(n), s)) in self.plan]
            values.grids = list(dict.fromkeys(grids))
        return list(found.values())

    def _pass_on(self, node: Node) -> None:
        """What a mover read by a grid, its readers read by it."""
        grid = self.plan.pop((id(node), 0), None)
        if grid is None:
            return
        for reader, slot in self._readers.get(node.output[0], ()):
            self.plan.setdefault((id(reader), slot), grid)
            if slot == 0 and moves(self.graph, reader):
                self._pass_on(reader)

    def _joins(self) -> dict[int, Node]:
        candidates = [n for n in self.graph.nodes if n.op_type in JOINS and not self._has_constant(n)]
        self.joins = {id(n): n for n in candidates}
        while left := [n for n in self.joins.values() if not (self._from_integers(n) and self._to_integers(n))]:
            for node in left:
                del self.joins[id(node)]
        return self.joins

    def _has_constant(self, node: Node) -> bool:
        return any(self.of(name) is None for name in node.input if name)

    def _from_integers(self, node: Node) -> bool:
        return any(self.source(self._of[name]) is not None for name in node.input)

    def _to_integers(self, node: Node) -> bool:
        values = self._of[node.output[0]]
        clamps = [n for n, _ in values.reads if n.op_type in CLAMPS]
        if len(values.reads) == 1 and clamps:
            values = self._of[clamps[0].output[0]]
        return any(self.by_grid(n, s) for n, s in values.reads)

    def _is_coded(self, values: Values) -> bool:
        reads = [(n, s) for n, s in values.reads if n.op_type != "Shape"]
        if self._only_clamped(values):
            return False
        all_by_grid = bool(reads) and all(self.by_grid(n, s) for n, s in reads)
        shown = any(m in self.graph.outputs for m in values.members)
        source = self.source(values)
        if source is None or source.op_type == "Gemm":
            return all_by_grid and not shown
        return True

    def _only_clamped(self, values: Values) -> bool:
        """Whether the grid lies behind the clamp that alone reads this."""
        if len(values.reads) != 1 or values.members != [values.root] or values.root in self.graph.outputs:
            return False
        node = values.reads[0][0]
        return node.op_type in CLAMPS and self.source(self._of[node.output[0]]) is not None

    def _common(self, values: Values) -> Grid | None:
        whole = [g for g in values.grids if g.top == TOP]
        others = any((id(n), s) not in self.plan and n.op_type != "Shape" for n, s in values.reads)
        others |= any(m in self.graph.outputs for m in values.members)
        if len(values.grids) == 1 and (whole or not others):
            return values.grids[0]
        return min(whole, key=lambda g: abs(g.scale), default=None)
