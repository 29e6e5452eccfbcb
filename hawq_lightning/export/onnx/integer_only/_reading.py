"""From a finished integer ONNX graph, with its QuantizeLinear and DequantizeLinear, to a program of integers.

Between a DequantizeLinear and the next QuantizeLinear the graph has real numbers. Here they are kept as what they are
made of: integers times scales. The QuantizeLinear then becomes one dyadic step, or a table of 256 codes where a
function of a single tensor of codes is rounded.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hawq_lightning._errors import HawqError
from hawq_lightning._extra import require
from hawq_lightning.export.onnx._ports import Port
from hawq_lightning.export.onnx.integer import Graph, Node
from hawq_lightning.export.onnx.integer_only._dyadic import dyadic
from hawq_lightning.export.onnx.integer_only._moves import MOVES, SHAPES
from hawq_lightning.export.onnx.integer_only._network import IntegerNetwork
from hawq_lightning.export.onnx.integer_only._steps import LARGEST, Dtype, Lookup, Move, Requantize, Step
from hawq_lightning.export.onnx.integer_only._values import (
    CODES,
    Function,
    Integers,
    Outside,
    Parts,
    Real,
    Stored,
    Term,
    Value,
)

_OUTPUT_BITS = 30  # of the largest magnitude that an INT32 output can have
_INSIDE_BITS = 24  # of sums that a clamp or a move reads before any grid: still room to add them up
_FINE = (1 << 15) - 1  # of a function's values that no grid rounds


class Reading:
    """The graph so far: integer tensors with their ranges, real ones with what they are made of.

    Args:
        graph: a finished integer file's.
        bits: of multipliers.
    """

    def __init__(self, graph: Graph, bits: int) -> None:
        self.graph, self.bits = graph, bits
        self.steps: list[Step] = []
        self.inputs: list[Port] = []
        self.integers: dict[str, Integers] = {}
        self.values: dict[str, Value] = {name: Outside(name) for name in graph.inputs}
        self.constants: dict[str, np.ndarray] = {}
        self.sizes = _sizes(graph)
        self._waiting: dict[str, tuple[Value, float, int, int, int]] = {}
        self._wholes: dict[str, Real] = {}
        self._ports: dict[str, str] = {}  # tensor of codes in the graph -> input of the program

    def constant(self, name: str) -> np.ndarray | None:
        """A stored tensor, or one computed from such."""
        if name in self.constants:
            return self.constants[name]
        return self.graph.array(name) if self.graph.is_constant(name) else None

    def emit(self, step: Step, held: Integers) -> str:
        """Add a step; returns its result's name."""
        self.steps.append(step)
        self.integers[step.result] = held
        return step.result

    def real(self, name: str, node: Node) -> Real:
        """A float tensor as a sum of integers times scales, without a clamp.

        Raises:
            HawqError: it has no such form.
        """
        value = self.values.get(name)
        if isinstance(value, Real) and value.clamped:
            return self.whole(value, f"{name}//whole")
        if isinstance(value, Function):
            return self.fine(value, f"{name}//fine")
        if isinstance(value, Real):
            return value
        if isinstance(value, Outside):
            raise refusal(node, f"it reads the input {value.name!r}, which has no grid")
        raise refusal(node, "it reads a stored weight" if isinstance(value, Stored) else "of what it reads")

    def whole(self, real: Real, name: str, scale: float | None = None) -> Real:
        """Sums with a clamp, or of several scales, as INT32 numbers of one scale over the range that they can have."""
        if name not in self._wholes:
            scale = self.scale_over([real], _INSIDE_BITS) if scale is None else scale
            low, high = (int(np.rint(end / scale)) for end in real.bounds(self.integers))
            self._requantize(real, scale, 0, low, high, name, np.int32)
            self._wholes[name] = Real((Term(name, 0, np.asarray(scale)),), np.zeros(()))
        return self._wholes[name]

    def scale_over(self, reals: Sequence[Real], bits: int) -> float:
        """A power of two, so that the largest value takes so many bits, and no multiplier more than it may."""
        far = max(abs(end) for real in reals for end in real.bounds(self.integers))
        largest = max(float(np.abs(t.scale).max()) for real in reals for t in real.terms)
        exponent = max(int(np.frexp(far or 1.0)[1]) - bits, int(np.frexp(largest or 1.0)[1]) - self.bits)
        return float(np.ldexp(1.0, exponent))

    def fine(self, function: Function, name: str) -> Real:
        """A function's values as integers of 16 bits, by a table."""
        scale = float(np.abs(function.values).max()) / _FINE or 1.0
        table = np.rint(function.values.astype(np.float64) / scale).astype(np.int32)
        if name not in self.integers:
            held = Integers(int(table.min()), int(table.max()))
            self.emit(Lookup(name, (function.tensor,), table), held)
        return Real((Term(name, 0, np.asarray(scale)),), np.zeros(()))

    def codes(self, name: str) -> str:
        """Name in the program of a tensor of codes of the graph."""
        if name in self._waiting:
            value, scale, zero, low, high = self._waiting.pop(name)
            if isinstance(value, Outside):
                count = sum(p.of == value.name for p in self.inputs)
                own = value.name if not count else f"{value.name}//{count + 1}"
                self.inputs.append(Port(own, value.name, scale, zero, low, high))
                self._ports[name] = own
                self.integers[own] = Integers(low, high, byte=True)
            else:
                self.round(value, scale, zero, low, high, name)
        return self._ports.get(name, name)

    def round(self, value: Value, scale: float, zero: int, low: int, high: int, name: str) -> None:
        """Put real numbers onto a grid, as UINT8 codes ``low`` to ``high``."""
        if isinstance(value, Parts):
            pieces = [f"{name}//{i}" for i in range(len(value.parts))]
            for part, piece in zip(value.parts, pieces):
                self.round(part, scale, zero, low, high, piece)
            self.emit(Move(name, tuple(pieces), "Concat", {"axis": value.axis}), Integers(low, high, byte=True))
        elif isinstance(value, Function):
            table = np.rint(value.values / np.float32(scale)) + zero
            step = Lookup(name, (value.tensor,), np.clip(table, low, high).astype(np.uint8))
            self.emit(step, Integers(low, high, byte=True))
        else:
            assert isinstance(value, Real)
            ends = [np.clip(np.rint(end / scale) + zero, low, high) for end in (value.low, value.high)]
            self._requantize(value, scale, zero, int(ends[0]), int(ends[1]), name, np.uint8)

    def _requantize(
        self,
        value: Real,
        scale: float,
        zero: int,
        low: int,
        high: int,
        name: str,
        dtype: Dtype,
    ) -> None:
        terms = value.terms
        numbers = dyadic(
            [t.scale / scale for t in terms],
            [t.zero for t in terms],
            [self.integers[t.tensor].reach for t in terms],
            value.constant / scale + zero,
            CODES if dtype is np.uint8 else 2 * (LARGEST + 1),
            self.bits,
        )
        step = Requantize(name, tuple(t.tensor for t in terms), numbers, low, high, dtype)
        self.emit(step, Integers(low, high, byte=dtype is np.uint8))

    def node(self, node: Node) -> bool:
        """Take in a node that is about codes or shapes; ``False`` for one that computes with real numbers."""
        if node.op_type == "QuantizeLinear":
            self._quantize(node)
        elif node.op_type == "DequantizeLinear":
            self._dequantize(node)
        elif all(self.constant(name) is not None for name in node.input if name):
            self._fold(node)
        elif node.op_type == "Shape" and not self._is_integer(node.input[0]):
            self._shape(node)
        elif any(self._is_integer(name) for name in node.input):
            self._move(node)
        else:
            return False
        return True

    def deliver(self, name: str) -> Port:
        """The integers of an output of the network.

        Raises:
            HawqError: it is no number that the program computes.
        """
        value = self.values.get(name)
        if isinstance(value, Function):
            value = self.fine(value, f"{name}//fine")
        if isinstance(value, Real) and (term := value.single) is not None:
            held = self.integers[term.tensor]
            kind = "uint8" if held.byte else "int32"
            return Port(term.tensor, name, float(term.scale.item()), term.zero, held.low, held.high, kind)
        parts = value.parts if isinstance(value, Parts) else (value,)
        reals = [self.fine(p, f"{name}//fine{i}") if isinstance(p, Function) else p for i, p in enumerate(parts)]
        sums = [real for real in reals if isinstance(real, Real)]
        if len(sums) < len(reals):
            raise HawqError(f"The output {name!r} is nothing that a program of integers computes.")
        scale = self.scale_over(sums, _OUTPUT_BITS)
        pieces = [f"{name}//{i}" for i in range(len(sums))] if isinstance(value, Parts) else [name]
        for real, piece in zip(sums, pieces):
            self.whole(real, piece, scale)
        low, high = (end([getattr(self.integers[p], k) for p in pieces]) for end, k in ((min, "low"), (max, "high")))
        if isinstance(value, Parts):
            self.emit(Move(name, tuple(pieces), "Concat", {"axis": value.axis}), Integers(low, high))
        return Port(name, name, scale, 0, low, high, "int32")

    def moved(self, node: Node, term: Term) -> Term:
        """A term whose integers a node moves."""
        fixed = {n: c for n in node.input[1:] if n and (c := self.constant(n)) is not None}
        reads = [term.tensor, *node.input[1:]]
        if node.op_type == "Pad":
            reads = [*reads[:2], f"{node.output[0]}//zero", *reads[3:]]
            code = np.asarray(term.zero, np.uint8 if self.integers[term.tensor].byte else np.int32)
            fixed[reads[2]] = code
        held = self.integers[term.tensor]
        name = f"{node.output[0]}//moved"
        self.emit(Move(name, tuple(reads), node.op_type, self.attributes(node), fixed), held)
        return Term(name, term.zero, term.scale)

    def attributes(self, node: Node) -> dict[str, object]:
        """Of a node, as Python's values."""
        helper = require("onnx").helper
        return {a.name: helper.get_attribute_value(a) for a in node.attribute}

    def _is_integer(self, name: str) -> bool:
        return name in self._waiting or name in self._ports or name in self.integers

    def _quantize(self, node: Node) -> None:
        grid = self.constant(node.input[1]), self.constant(node.input[2])
        if grid[0] is None or grid[1] is None or grid[0].size != 1 or grid[1].dtype != np.uint8:
            raise refusal(node, "its grid is none of UINT8 codes with one constant scale")
        if (value := self.values.get(node.input[0])) is None:
            raise refusal(node, "of what it reads")
        self._waiting[node.output[0]] = (value, float(grid[0]), int(grid[1]), 0, CODES - 1)

    def _dequantize(self, node: Node) -> None:
        scale, codes = self.constant(node.input[1]), self.constant(node.input[0])
        assert scale is not None
        if codes is not None:
            axis = int(self.graph.attribute(node, "axis", 1)) % max(1, codes.ndim)
            self.values[node.output[0]] = Stored(codes.astype(np.int64), scale.astype(np.float64).reshape(-1), axis)
            return
        zero = self.constant(node.input[2])
        assert zero is not None
        term = Term(self.codes(node.input[0]), int(zero), scale.astype(np.float64))
        self.values[node.output[0]] = Real((term,), np.zeros(()))

    def _move(self, node: Node) -> None:
        if node.op_type == "Clip" and node.input[0] in self._waiting:
            value, scale, zero, _, _ = self._waiting.pop(node.input[0])
            low, high = (self.constant(name) for name in node.input[1:3])
            assert low is not None and high is not None
            self._waiting[node.output[0]] = (value, scale, zero, int(low), int(high))
            return
        if node.op_type not in MOVES and node.op_type not in SHAPES:
            raise refusal(node)
        reads = [self.codes(name) if self._is_integer(name) else name for name in node.input]
        fixed = {n: c for n in node.input if n and (c := self.constant(n)) is not None}
        first = next(n for n in reads if n in self.integers)
        step = Move(node.output[0], tuple(reads), node.op_type, self.attributes(node), fixed)
        self.emit(step, self.integers[first])

    def _shape(self, node: Node) -> None:
        value = self.values.get(node.input[0])
        if isinstance(value, Outside):  # any of its grids
            waiting = next((k for k, (v, *_) in self._waiting.items() if v == value), None)
            ports = [p.name for p in self.inputs if p.of == value.name]
            tensor = self.codes(waiting) if not ports and waiting else next(iter(ports), "")
        else:
            tensor = self.real(node.input[0], node).terms[0].tensor
        if not tensor:
            raise refusal(node, f"no grid reads the input {node.input[0]!r} before it")
        self.emit(Move(node.output[0], (tensor,), "Shape", self.attributes(node)), Integers(0, LARGEST))

    def _fold(self, node: Node) -> None:
        run = require("onnx.reference").ReferenceEvaluator(node)
        given = {name: self.constant(name) for name in node.input if name}
        self.constants |= dict(zip(node.output, run.run(None, given)))

    def network(self) -> IntegerNetwork:
        """What was read, with the graph's outputs."""
        outputs = tuple(self.deliver(name) for name in self.graph.outputs)
        return IntegerNetwork(tuple(self.inputs), outputs, tuple(self.steps))


def refusal(node: Node, why: str = "") -> HawqError:
    """Of an operator that has no integer form."""
    reason = f": {why}" if why else ""
    return HawqError(
        f"{node.op_type} {node.name or node.output[0]!r} has no integer form{reason}; the integer ONNX file leaves it "
        "float."
    )


def _sizes(graph: Graph) -> dict[str, list[int | None]]:
    """Tensor -> its shape, ``None`` for an axis of any size."""
    inferred = require("onnx").shape_inference.infer_shapes(graph.proto, data_prop=True).graph
    return {
        v.name: [d.dim_value if d.HasField("dim_value") else None for d in v.type.tensor_type.shape.dim]
        for v in (*inferred.input, *inferred.value_info, *inferred.output)
        if v.type.tensor_type.HasField("shape")
    }
