"""Which tensors of a network are kept as codes where integer kernels compute it: one decision for all that need it.

An integer kernel of a convolution, sum, product, concatenation or pooling reads codes and gives codes. So a tensor that
such a kernel makes lies on a grid of 8 bits, whoever reads it, and one float tensor in a residual block undoes the gain
of it all. The decision is about a list of operations, from wherever it comes: a forward pass, or the graph of a file.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Sequence
from dataclasses import dataclass, field
from enum import Enum


class Kind(Enum):
    """What an operation is to integer kernels."""

    CONVOLUTION = "gives codes, whoever reads them"
    MATRIX = "a linear layer of vectors: gives codes if all that read it want codes, else floats"
    JOIN = "a sum, product, concatenation or pooling: codes in, codes out"
    CLAMP = "a part of the grid behind it"
    MOVE = "moves values, or takes the largest: the same to codes"
    SHAPE = "asks for the shape alone"
    OTHER = "computes in float"


@dataclass(frozen=True, eq=False)
class Operation:
    """A call of a function, or a node.

    Attributes:
        kind: see :class:`Kind`.
        reads: tensors, in order; ``None`` where one is a constant.
        makes: tensors.
        by_grid: which of ``reads`` a layer's own quantizer reads.
        about: whatever its maker wants to know of it.
    """

    kind: Kind
    reads: tuple[Hashable | None, ...]
    makes: tuple[Hashable, ...]
    by_grid: Collection[int] = ()
    about: object = None


@dataclass(eq=False)
class Value:
    """A tensor and all that hold the same values moved around: they lie on one grid or on none.

    Attributes:
        root: the tensor that is computed.
        members: it and the moved ones.
        reads: where a member is computed with, or its shape asked for.
        shown: whether the network gives a member away.
        coded: whether it is kept as codes.
    """

    root: Hashable
    members: list[Hashable] = field(default_factory=list)
    reads: list[tuple[Operation, int]] = field(default_factory=list)
    shown: bool = False
    coded: bool = False


class IntegerForm:
    """Decides for a list of operations.

    A convolution's result is always kept as codes: its kernel gives nothing else. A sum, product, concatenation or
    pooling is computed on codes where one operand comes from integer kernels and something reads the result by a grid.
    A residual stream that normalizations read stays float so.

    Args:
        operations: in an order in which they can run.
        inputs: tensors that nothing makes.
        outputs: tensors that the network gives.

    Attributes:
        values: all of them.
        joins: operations that are computed on codes.
    """

    def __init__(
        self, operations: Sequence[Operation], inputs: Collection[Hashable], outputs: Collection[Hashable]
    ) -> None:
        self._outputs = {*outputs}
        self._makers = {made: o for o in operations for made in o.makes}
        self._readers: dict[Hashable, list[tuple[Operation, int]]] = {}
        for operation in operations:
            for slot, read in enumerate(operation.reads):
                if read is not None:
                    self._readers.setdefault(read, []).append((operation, slot))
        self.values = self._gather([*inputs, *(made for o in operations for made in o.makes)])
        self._of = {m: v for v in self.values for m in v.members}
        self.joins = {o for o in operations if o.kind is Kind.JOIN and None not in o.reads}
        while left := {o for o in self.joins if not (self._from_integers(o) and self._to_integers(o))}:
            self.joins -= left
        for value in self.values:
            value.coded = self._is_coded(value)

    def of(self, tensor: Hashable) -> Value | None:
        """The value that a tensor holds; ``None`` for constants."""
        return self._of.get(tensor)

    def maker(self, value: Value) -> Operation | None:
        """What makes the root."""
        return self._makers.get(value.root)

    def clamp(self, value: Value) -> Operation | None:
        """The clamp that makes the root from what nothing else reads."""
        made = self.maker(value)
        if made is None or made.kind is not Kind.CLAMP or len(self._readers.get(made.reads[0], ())) > 1:
            return None
        return None if made.reads[0] in self._outputs else made

    def source(self, value: Value) -> Operation | None:
        """The operation with integer kernels that makes the root, directly or before its clamp."""
        clamp = self.clamp(value)
        made = self._makers.get(value.root if clamp is None else clamp.reads[0])
        return made if made is not None and self._has_kernels(made) else None

    def by_grid(self, operation: Operation, slot: int) -> bool:
        """Whether an operation reads codes."""
        return slot in operation.by_grid or operation in self.joins

    def _has_kernels(self, operation: Operation) -> bool:
        return operation.kind in (Kind.CONVOLUTION, Kind.MATRIX) or operation in self.joins

    def _gather(self, tensors: Sequence[Hashable]) -> list[Value]:
        found: dict[Hashable, Value] = {}
        for tensor in tensors:
            root = tensor
            while (made := self._makers.get(root)) is not None and made.kind is Kind.MOVE:
                assert made.reads[0] is not None
                root = made.reads[0]
            value = found.setdefault(root, Value(root))
            value.members.append(tensor)
            value.shown = value.shown or tensor in self._outputs
            moved = [(o, s) for o, s in self._readers.get(tensor, ()) if not (s == 0 and o.kind is Kind.MOVE)]
            value.reads.extend(moved)
        return [*found.values()]

    def _from_integers(self, join: Operation) -> bool:
        return any(self._from(self._of.get(read)) for read in join.reads)

    def _from(self, value: Value | None) -> bool:
        return value is not None and self.source(value) is not None

    def _to_integers(self, join: Operation) -> bool:
        value = self._of[join.makes[0]]
        clamps = [o for o, _ in value.reads if o.kind is Kind.CLAMP]
        if len(value.reads) == 1 and clamps:
            value = self._of[clamps[0].makes[0]]
        return any(self.by_grid(o, s) for o, s in value.reads)

    def _is_coded(self, value: Value) -> bool:
        reads = [(o, s) for o, s in value.reads if o.kind is not Kind.SHAPE]
        if self._only_clamped(value):
            return False
        source = self.source(value)
        if source is None or source.kind is Kind.MATRIX:
            return bool(reads) and all(self.by_grid(o, s) for o, s in reads) and not value.shown
        return True

    def _only_clamped(self, value: Value) -> bool:
        """Whether the grid lies behind the clamp that alone reads this."""
        if len(value.reads) != 1 or value.members != [value.root] or value.shown:
            return False
        reader = value.reads[0][0]
        return reader.kind is Kind.CLAMP and self._from(self._of[reader.makes[0]])
