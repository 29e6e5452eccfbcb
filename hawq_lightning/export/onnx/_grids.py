"""The stored weights and the activation grids of an ONNX graph, read out of its QuantizeLinear and DequantizeLinear."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from hawq_lightning._extra import require
from hawq_lightning._plan import Plan
from hawq_lightning.export.onnx._low_bits import replace_nodes
from hawq_lightning.export.onnx._translate import translated
from hawq_lightning.layers import kinds
from hawq_lightning.quantization import quantizable_layers

_MOVES = ("Transpose", "Reshape", "Pad", "Flatten")  # nodes between a grid and its reader that change no value


@dataclass(frozen=True)
class WeightGrid:
    """A weight stored as integers.

    Attributes:
        layer: a layer that reads it.
        result: tensor of its floats in the graph.
        codes: integers.
        scale: float32, one a channel, 0 of a dead one.
        axis: channel axis.
        planned: bits in the plan.
        bits: of two's complement that its integers need, and at least those of the plan: midrise levels are odd
            integers, which need one more.
    """

    layer: str
    result: str
    codes: np.ndarray
    scale: np.ndarray
    axis: int
    planned: int
    bits: int

    @property
    def shape(self) -> list[int]:
        """Of the scale, to be broadcast over the codes."""
        return [-1 if i == self.axis else 1 for i in range(self.codes.ndim)]

    @property
    def values(self) -> np.ndarray:
        """Float32, the codes' shape."""
        floats: np.ndarray = self.codes.astype(np.float32) * self.scale.reshape(self.shape)
        return floats


@dataclass(frozen=True)
class ActivationGrid:
    """A grid that a tensor is rounded to: ``(code - zero) * scale`` for codes 0 to ``2^bits - 1``.

    Attributes:
        read: the float tensor.
        result: the tensor on the grid.
    """

    read: str
    result: str
    scale: np.float32
    zero: int
    bits: int


class Grids:
    """All of a graph, by the tensor that a DequantizeLinear gives.

    Args:
        proto: of :func:`fixed_graph`.
        model: quantized, or deployed.
        plan: that it carries.
    """

    def __init__(self, proto: Any, model: nn.Module, plan: Plan) -> None:
        self.proto, self.onnx = proto, require("onnx")
        self._made = {out: node for node in proto.graph.node for out in node.output}
        self._stored = {t.name: self.onnx.numpy_helper.to_array(t) for t in proto.graph.initializer}
        self._stored |= {n.output[0]: self._constant(n) for n in proto.graph.node if n.op_type == "Constant"}
        bits = {name: site.bits for site in plan.weights for name in site.layers}
        self._layer_of = {
            f"{reader.prefix}{reader.quantizer_attribute}.codes": (name, bits[name])
            for name, reader in quantizable_layers(model)[0].items()
            if name in bits
        }
        found = [self._grid(node) for node in proto.graph.node if node.op_type == "DequantizeLinear"]
        self.weights = {g.result: g for g in found if isinstance(g, WeightGrid)}
        self.activations = {g.result: g for g in found if isinstance(g, ActivationGrid)}

    def readers(self) -> list[tuple[str, WeightGrid, ActivationGrid | None]]:
        """The products of the graph: tensor that each gives, its weight, and the grid of what it reads."""
        products = {op for kind in kinds() for op in kind.onnx_ops}
        rows = []
        for node in self.proto.graph.node:
            if node.op_type in products and (weight := self.weights.get(self._before(node.input[1]))) is not None:
                rows.append((node.output[0], weight, self.activations.get(self._before(node.input[0]))))
        return rows

    def _before(self, name: str) -> str:
        while (node := self._made.get(name)) is not None and node.op_type in _MOVES:
            name = node.input[0]
        return name

    def _grid(self, node: Any) -> WeightGrid | ActivationGrid:
        if node.input[0] in self._stored:
            codes = self._stored[node.input[0]]
            layer, planned = self._layer_of.get(node.input[0], (node.input[0], 1))
            axis = next((a.i for a in node.attribute if a.name == "axis"), 1) % codes.ndim
            bits = max(planned, signed_bits(int(codes.min(initial=0)), int(codes.max(initial=0))))
            return WeightGrid(layer, node.output[0], codes, self._stored[node.input[1]], axis, planned, bits)
        source, top = self._made[node.input[0]], 255
        if source.op_type == "Clip":
            top, source = int(self._stored[source.input[2]]), self._made[source.input[0]]
        scale, zero = np.float32(self._stored[node.input[1]]), int(self._stored[node.input[2]])
        return ActivationGrid(source.input[0], node.output[0], scale, zero, top.bit_length())

    def _constant(self, node: Any) -> np.ndarray:
        for attribute in node.attribute:
            if attribute.name == "value":
                array: np.ndarray = self.onnx.numpy_helper.to_array(attribute.t)
                return array
            if attribute.name == "value_float":
                return np.asarray(attribute.f, np.float32)
        return np.asarray(np.nan, np.float32)


def signed_bits(low: int, high: int) -> int:
    """The narrowest two's complement that holds a range."""
    return 1 + max((~low if low < 0 else low).bit_length(), (~high if high < 0 else high).bit_length())


def fixed_graph(model: nn.Module, inputs: tuple[torch.Tensor, ...], *, one_image: bool) -> Any:
    """A graph of standard operators, INT8 weights behind DequantizeLinear, in which every shape is a number.

    Args:
        model: deployed.
        inputs: example inputs.
        one_image: the first axis of every input holds images, and one of them is used; else all of the example.

    Raises:
        HawqError: an operation cannot be exported.
    """
    return translated(model, tuple(x[:1] for x in inputs) if one_image else inputs, free_batch=False)


def without_unread(proto: Any, nodes: list[Any], also: Mapping[str, Any]) -> None:
    """Put nodes into a graph, in place, with more initializers, and drop whatever no output depends on."""
    read = {o.name for o in proto.graph.output}
    needed = []
    for node in reversed(nodes):
        if read.intersection(node.output):
            read.update(node.input)
            needed.append(node)
    replace_nodes(proto, needed[::-1], list(also.values()))
