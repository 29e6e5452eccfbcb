"""Operators on real numbers between two grids, as integer arithmetic."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from hawq_lightning._errors import HawqError
from hawq_lightning._extra import require
from hawq_lightning.export.onnx.integer import Graph, Node
from hawq_lightning.export.onnx.integer_only._moves import MOVES, SHAPES
from hawq_lightning.export.onnx.integer_only._network import IntegerNetwork
from hawq_lightning.export.onnx.integer_only._pools import average, mean, nearest
from hawq_lightning.export.onnx.integer_only._products import convolution, linear, transposed
from hawq_lightning.export.onnx.integer_only._reading import Reading, refusal
from hawq_lightning.export.onnx.integer_only._steps import Multiplication
from hawq_lightning.export.onnx.integer_only._values import CODES, Function, Integers, Parts, Real, Term, Value

_ONE_BY_ONE = frozenset({
    "Abs", "Add", "Celu", "Clip", "Div", "Elu", "Erf", "Exp", "Gelu", "HardSigmoid", "HardSwish", "LeakyRelu", "Max",
    "Min", "Mish", "Mul", "Neg", "PRelu", "Pow", "Relu", "Selu", "Sigmoid", "Softplus", "Softsign", "Sqrt", "Sub",
    "Tanh", "ThresholdedRelu",
})  # fmt: skip
"""Operators that take one number at a time: of a single tensor of codes they are a table."""
_LINEAR = frozenset({"Add", "Sub", "Neg", "Relu", "Clip"})


def read(graph: Graph, bits: int) -> IntegerNetwork:
    """The program of a finished integer graph.

    Args:
        graph: its weights are stored codes; its nodes lie in an order in which they can run.
        bits: of the multipliers.

    Raises:
        HawqError: an operator has no integer form, or a sum could leave INT32.
    """
    reading = Reading(graph, bits)
    _refuse(graph)
    for node in graph.nodes:
        if not reading.node(node):
            reading.values[node.output[0]] = _value(reading, node)
    return reading.network()


def _refuse(graph: Graph) -> None:
    """Name the kinds of operators that have no form at all, before the first that merely reads such a one."""
    fixed = {""}
    lacking: dict[str, str] = {}
    known = {*_TAKES, *_ONE_BY_ONE, *MOVES, "QuantizeLinear", "DequantizeLinear"}
    for node in graph.nodes:
        if all(name in fixed or graph.is_constant(name) for name in node.input):
            fixed.update(node.output)
        elif node.op_type not in known and node.op_type not in SHAPES:
            lacking.setdefault(node.op_type, node.name or node.output[0])
    if lacking:
        names = " and ".join(filter(None, (", ".join(list(lacking)[:-1]), list(lacking)[-1])))
        have, them = ("has", "it") if len(lacking) == 1 else ("have", "them")
        first = next(iter(lacking.values()))
        raise HawqError(f"{names} {have} no integer form ({first!r} first); the integer ONNX file leaves {them} float.")


def _value(reading: Reading, node: Node) -> Value:
    if (function := _function(reading, node)) is not None:
        return function
    if node.op_type in MOVES and node.op_type not in ("Concat", "Shape"):
        real = reading.real(node.input[0], node)
        if real.single is None:
            real = reading.whole(real, f"{node.input[0]}//whole")
        (term,) = real.terms
        if node.op_type == "MaxPool" and not (reading.integers[term.tensor].byte and term.scale > 0):
            raise refusal(node, "it reads sums that no grid rounds")
        return replace(real, terms=(reading.moved(node, term),))
    take = _TAKES.get(node.op_type)
    if take is None:
        raise refusal(node)
    return take(reading, node)


def _function(reading: Reading, node: Node) -> Function | None:
    """The node's values at all codes, where it reads one tensor of codes and single numbers besides."""
    if node.op_type not in _ONE_BY_ONE:
        return None
    given: dict[str, np.ndarray] = {}
    tensors, curved = set(), node.op_type not in _LINEAR
    for name in filter(None, node.input):
        stored, value = reading.constant(name), reading.values.get(name)
        if stored is not None:
            if stored.size != 1:
                return None
            given[name] = stored.reshape(()).astype(np.float32)
            continue
        if isinstance(value, Real) and (at := value.at_codes()) is not None:
            tensor, given[name] = value.terms[0].tensor, at
            curved = curved or (value.clamped and node.op_type not in ("Relu", "Clip"))
        elif isinstance(value, Function):
            tensor, given[name], curved = value.tensor, value.values, True
        else:
            return None
        tensors.add(tensor)
    if len(tensors) != 1 or not curved or not reading.integers[tensor].byte:
        return None
    by_number = node.op_type in ("Mul", "Div") and any(reading.constant(n) is not None for n in node.input)
    if by_number and not any(isinstance(reading.values.get(n), Function) for n in node.input):
        return None  # a factor, which a scale takes in
    (values,) = require("onnx.reference").ReferenceEvaluator(node).run(None, given)
    values = np.broadcast_to(np.asarray(values, np.float32), (CODES,))
    return Function(tensor, values) if np.isfinite(values).all() else None


def _add(reading: Reading, node: Node) -> Real:
    sign = -1 if node.op_type == "Sub" else 1
    sides = [reading.constant(name) for name in node.input]
    reals = [
        Real((), side.astype(np.float64)) if side is not None else reading.real(name, node)
        for side, name in zip(sides, node.input)
    ]
    return reals[0].plus(reals[1], sign)


def _multiply(reading: Reading, node: Node) -> Real:
    numbers = [reading.constant(name) for name in node.input]
    if node.op_type == "Div" and numbers[1] is None:
        raise refusal(node)
    for number, other in zip(numbers, node.input[::-1]):
        if number is not None:
            factor = number.astype(np.float64)
            value = reading.values.get(other)
            if isinstance(value, Real) and value.clamped and (factor.size > 1 or factor <= 0):
                value = None
            value = value if isinstance(value, Real) else reading.real(other, node)
            return value.times(1 / factor if node.op_type == "Div" else factor)
    terms = [reading.real(name, node).single for name in node.input]
    if terms[0] is None or terms[1] is None:
        raise refusal(node, "a factor has no grid")
    sides = [(held.low - t.zero, held.high - t.zero) for t in terms if t and (held := reading.integers[t.tensor])]
    ends = [a * b for a in sides[0] for b in sides[1]]
    name = f"{node.output[0]}//product"
    step = Multiplication(name, (terms[0].tensor, terms[1].tensor), (terms[0].zero, terms[1].zero))
    reading.emit(step, Integers(min(ends), max(ends)))
    return Real((Term(name, 0, np.asarray(terms[0].scale * terms[1].scale)),), np.zeros(()))


def _norm(reading: Reading, node: Node) -> Real:
    numbers = [reading.constant(name) for name in node.input[1:5]]
    if any(n is None for n in numbers):
        raise refusal(node, "its numbers are computed")
    gamma, beta, mean, variance = (np.asarray(n, np.float64) for n in numbers)
    slope = gamma / np.sqrt(variance + float(reading.graph.attribute(node, "epsilon", 1e-5)))
    size = reading.sizes.get(node.input[0])
    if size is None:
        raise refusal(node, "the axes of what it reads are not known")
    shape = (-1, *[1] * (len(size) - 2))
    real = reading.real(node.input[0], node).times(slope.reshape(shape))
    return replace(real, constant=real.constant + (beta - mean * slope).reshape(shape))


def _clamp(reading: Reading, node: Node) -> Value:
    low, high = 0.0, np.inf
    if node.op_type == "Clip":
        ends = [reading.constant(n) if n else None for n in (*node.input[1:3], "", "")[:2]]
        low, high = (float(end) if end is not None else sign * np.inf for end, sign in zip(ends, (-1, 1)))
    value = reading.values.get(node.input[0])
    if isinstance(value, Parts):
        return Parts(tuple(_clamped(reading, p, low, high, node) for p in value.parts), value.axis)
    return _clamped(reading, value if isinstance(value, Real) else reading.real(node.input[0], node), low, high, node)


def _clamped(reading: Reading, value: Value, low: float, high: float, node: Node) -> Real | Function:
    if isinstance(value, Function):
        return Function(value.tensor, np.clip(value.values, low, high).astype(np.float32))
    if not isinstance(value, Real):
        raise refusal(node)
    return value.clamp(low, high)


def _concat(reading: Reading, node: Node) -> Parts:
    values = [reading.values.get(name) for name in node.input]
    parts = [v if isinstance(v, (Real, Function)) else reading.real(n, node) for v, n in zip(values, node.input)]
    return Parts(tuple(parts), int(reading.graph.attribute(node, "axis", 0)))


_TAKES: dict[str, Callable[[Reading, Node], Value]] = {
    "Add": _add,
    "AveragePool": average,
    "BatchNormalization": _norm,
    "Clip": _clamp,
    "Concat": _concat,
    "Conv": convolution,
    "ConvTranspose": transposed,
    "Div": _multiply,
    "Gemm": linear,
    "GlobalAveragePool": mean,
    "MatMul": linear,
    "Mul": _multiply,
    "Neg": lambda reading, node: reading.real(node.input[0], node).times(np.asarray(-1.0)),
    "ReduceMean": mean,
    "ReduceSum": mean,
    "Relu": _clamp,
    "Resize": nearest,
    "Sub": _add,
}
