"""A program of integers as an ONNX graph of integer operators alone.

Sums are ConvInteger and MatMulInteger; a dyadic step is Mul and Add on INT64, moved above 0 by 2^62, then BitShift, Max
and Min on UINT64: BitShift knows unsigned integers only, and before version 1.32 onnxruntime's Min, Max and Clip of
INT64 give the wrong one of two numbers whose upper 32 bits are equal. Weights are UINT8 with zero point 128: older
onnxruntimes have these operators of unsigned operands only, and with them no CPU saturates. Odd midrise levels of 8
bits take two weights, whose sums are added.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import singledispatchmethod
from typing import Any

import numpy as np

from hawq_lightning._extra import require
from hawq_lightning.export.onnx.integer_only._dyadic import SUM_BITS
from hawq_lightning.export.onnx.integer_only._network import IntegerNetwork
from hawq_lightning.export.onnx.integer_only._steps import (
    AxisSum,
    Convolution,
    Lookup,
    Move,
    Multiplication,
    Product,
    Requantize,
    Step,
    WindowSum,
)
from hawq_lightning.export.onnx.integer_only._windows import Window

OPSET = 21
Take = Callable[[list[str], str], str]
"""Adds an operator: its inputs, its result."""
_MIDDLE = 128  # zero point of weights
_INT8 = range(-128, 128)


class Certificate:
    """Writes a program.

    Args:
        network: the program.
        free_batch: name the first axis of every input as free.
        shapes: of the inputs.
    """

    def __init__(self, network: IntegerNetwork, shapes: dict[str, tuple[int, ...]], free_batch: bool) -> None:
        self.network, self.shapes, self.free_batch = network, shapes, free_batch
        self.onnx = require("onnx")
        self.nodes: list[object] = []
        self.stored: dict[str, np.ndarray] = {}

    def proto(self) -> Any:
        """The ONNX model."""
        for step in self.network.steps:
            self._write(step)
        helper, types = self.onnx.helper, self.onnx.TensorProto
        outputs = {port.of: port for port in self.network.outputs}
        for of, port in outputs.items():
            if port.name != of:
                self._node("Identity", [port.name], of)
        batch = ["batch"] if self.free_batch else []
        takes = [
            helper.make_tensor_value_info(p.name, types.UINT8, [*batch, *self.shapes[p.of][len(batch) :]])
            for p in self.network.inputs
        ]
        gives = [helper.make_tensor_value_info(of, getattr(types, p.dtype.upper()), None) for of, p in outputs.items()]
        arrays = [self.onnx.numpy_helper.from_array(np.asarray(a, order="C"), n) for n, a in self.stored.items()]
        graph = helper.make_graph(self.nodes, "main", takes, gives, arrays)
        proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=10)
        inferred = self.onnx.shape_inference.infer_shapes(proto).graph
        for value, known in zip(proto.graph.output, inferred.output):
            value.CopyFrom(known)
        return proto

    def _node(self, op: str, reads: list[str], result: str, **attributes: object) -> str:
        self.nodes.append(self.onnx.helper.make_node(op, reads, [result], name=f"{result}//{op}", **attributes))
        return result

    def _keep(self, name: str, value: np.ndarray) -> str:
        self.stored[name] = value
        return name

    def _number(self, value: int, dtype: type[np.generic]) -> str:
        return self._keep(f"//{np.dtype(dtype).name}/{value}", np.asarray(value, dtype))

    def _cast(self, name: str, dtype: type[np.generic], result: str) -> str:
        return self._node("Cast", [name], result, to=self.onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype)))

    @singledispatchmethod
    def _write(self, step: Step) -> None:
        raise AssertionError(f"no operators for {type(step).__name__}")

    @_write.register
    def _(self, step: Convolution) -> None:
        shape = (-1, *[1] * len(step.window.kernel))
        bias = None if step.bias is None else step.bias.reshape(shape)
        how = _attributes(step.window) | {"group": step.groups}
        self._sums(step, step.weight, bias, lambda reads, result: self._node("ConvInteger", reads, result, **how))

    @_write.register
    def _(self, step: Product) -> None:
        self._sums(step, step.weight, step.bias, lambda reads, result: self._node("MatMulInteger", reads, result))

    def _sums(self, step: Convolution | Product, weight: np.ndarray, bias: np.ndarray | None, take: Take) -> None:
        narrow = weight.min(initial=0) in _INT8 and weight.max(initial=0) in _INT8
        halves = [weight] if narrow else [weight // 2, weight - weight // 2]
        last = len(halves) == 1 and bias is None
        made = []
        for i, half in enumerate(halves):
            middle = _MIDDLE if half.max(initial=0) in _INT8 else _MIDDLE - 1
            stored = self._keep(f"{step.result}//weight{i or ''}", (half + middle).astype(np.uint8))
            reads = [step.reads[0], stored, self._number(step.zero, np.uint8), self._number(middle, np.uint8)]
            made.append(take(reads, step.result if last else f"{step.result}//part{i}"))
        if len(made) > 1:
            made = [self._node("Add", made, step.result if bias is None else f"{step.result}//parts")]
        if bias is not None:
            self._node("Add", [made[0], self._keep(f"{step.result}//bias", bias.astype(np.int32))], step.result)

    @_write.register
    def _(self, step: Requantize) -> None:
        name, numbers = step.result, step.numbers
        shift = numbers.shift.astype(np.int64)
        above = np.int64(1) << (SUM_BITS - shift)  # 2^62, more than any sum and end, by the shift
        total = self._keep(f"{name}//offset", numbers.offset + (np.int64(1) << SUM_BITS))
        for i, (read, multiplier) in enumerate(zip(step.reads, numbers.multipliers)):
            wide = self._cast(read, np.int64, f"{name}//wide{i}")
            product = self._node("Mul", [wide, self._keep(f"{name}//b{i}", multiplier)], f"{name}//times{i}")
            total = self._node("Add", [product, total], f"{name}//sum{i}")
        total = self._cast(total, np.uint64, f"{name}//unsigned")
        by = self._keep(f"{name}//c", shift.astype(np.uint64))
        total = self._node("BitShift", [total, by], f"{name}//shifted", direction="RIGHT")
        least = self._keep(f"{name}//least", (above + step.low).astype(np.uint64))
        most = self._keep(f"{name}//most", (above + step.high).astype(np.uint64))
        total = self._node("Max", [total, least], f"{name}//above")
        total = self._node("Min", [total, most], f"{name}//clipped")
        total = self._cast(total, np.int64, f"{name}//signed")
        total = self._node("Sub", [total, self._keep(f"{name}//2^62", above)], f"{name}//lowered")
        self._cast(total, step.dtype, name)

    @_write.register
    def _(self, step: Lookup) -> None:
        index = self._cast(step.reads[0], np.int32, f"{step.result}//index")
        self._node("Gather", [self._keep(f"{step.result}//table", step.table), index], step.result)

    def _centred(self, name: str, zero: int, result: str) -> str:
        """``name - zero`` as INT32."""
        wide = self._cast(name, np.int32, f"{result}//wide")
        return self._node("Sub", [wide, self._number(zero, np.int32)], f"{result}//centred") if zero else wide

    @_write.register
    def _(self, step: Multiplication) -> None:
        sides = [self._centred(n, z, f"{step.result}//{i}") for i, (n, z) in enumerate(zip(step.reads, step.zeros))]
        self._node("Mul", sides, step.result)

    @_write.register
    def _(self, step: WindowSum) -> None:
        alone = self._keep(f"{step.result}//alone", np.asarray([-1, 1, *step.shape[1:]], np.int64))
        ones = self._keep(f"{step.result}//ones", np.ones((1, 1, *step.window.kernel), np.uint8))
        zeros = [self._number(step.zero, np.uint8), self._number(0, np.uint8)]
        each = self._node("Reshape", [step.reads[0], alone], f"{step.result}//each")  # a channel is an image of its own
        sums = self._node("ConvInteger", [each, ones, *zeros], f"{step.result}//each_sum", **_attributes(step.window))
        out = np.asarray([-1, step.shape[0], *step.window.counts(step.shape[1:])], np.int64)
        self._node("Reshape", [sums, self._keep(f"{step.result}//shape", out)], step.result)

    @_write.register
    def _(self, step: AxisSum) -> None:
        centred = self._centred(step.reads[0], step.zero, step.result)
        axes = self._keep(f"{step.result}//axes", np.asarray(step.axes, np.int64))
        self._node("ReduceSum", [centred, axes], step.result, keepdims=int(step.keep))

    @_write.register
    def _(self, step: Move) -> None:
        held = step.constants
        stored = {n: self._keep(f"{step.result}//{i}", held[n]) for i, n in enumerate(step.reads) if n in held}
        reads = [stored.get(name, name) for name in step.reads]
        self._node(step.op, reads, step.result, **step.attributes)


def _attributes(window: Window) -> dict[str, object]:
    return {"strides": list(window.strides), "dilations": list(window.dilations), "pads": list(window.pads),
            "kernel_shape": list(window.kernel)}  # fmt: skip
