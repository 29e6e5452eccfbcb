"""Narrowing the weights of an ONNX graph: INT8 and INT16 initializers become the narrowest type that holds them."""

from __future__ import annotations

import math
from collections.abc import Container, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from hawq_lightning._errors import HawqError
from hawq_lightning._extra import require

INT2_OPSET = 25
_WIDTHS = (2, 4, 8, 16)
# IR versions that came with the opsets
_IR = {21: 10, 25: 13}


def pack_low_bit_weights(proto: Any) -> dict[str, str]:
    """Store every weight behind a DequantizeLinear in INT2, INT4, INT8 or INT16, in place.

    Two bits of a layer with a single channel become INT4: nothing stops onnxruntime 1.32 from making a QLinearConv of
    it, for an Add of one zero is removed before (see ``split_bias``), and that has no INT2.

    Args:
        proto: an ONNX model of opset 21 or later.

    Returns:
        initializer -> its type.

    Raises:
        HawqError: a two-bit type is needed and this version of onnx has none.
    """
    onnx = require("onnx")
    types = {}
    single = _single_channels(proto)
    for name in [t.name for t in weights(proto)]:
        tensor = next(t for t in proto.graph.initializer if t.name == name)
        values = onnx.numpy_helper.to_array(tensor).astype(np.int16)
        if _four_odd_levels(values):
            values = (values - 1) // 2
            _add_half(proto, name)
            tensor = next(t for t in proto.graph.initializer if t.name == name)
        bits = next(b for b in _WIDTHS if b == _WIDTHS[-1] or _fits(values, b))
        if bits == 2 and name in single:
            bits = 4
        types[tensor.name] = f"INT{bits}"
        kind = getattr(onnx.TensorProto, f"INT{bits}", None)
        if kind is None:
            raise HawqError(
                f"onnx {onnx.__version__} has no INT{bits}, which {tensor.name} needs: pip install -U onnx."
            )
        packed = _pack(values, bits) if bits < 8 else values.astype(f"<i{bits // 8}")
        tensor.CopyFrom(onnx.helper.make_tensor(tensor.name, kind, list(tensor.dims), packed.tobytes(), raw=True))
    if "INT2" in types.values():
        _raise_opset(proto, INT2_OPSET)
    return types


def weights(proto: Any) -> Iterator[Any]:
    """The initializers that a DequantizeLinear reads as codes, each once; INT32 ones are biases."""
    biases = require("onnx").TensorProto.INT32
    stored = {t.name: t for t in proto.graph.initializer if t.data_type != biases}
    seen = set()
    for node in proto.graph.node:
        if node.op_type == "DequantizeLinear" and node.input[0] in stored and node.input[0] not in seen:
            seen.add(node.input[0])
            yield stored[node.input[0]]


def _single_channels(proto: Any) -> set[str]:
    """Codes with one scale."""
    sizes = {t.name: math.prod(t.dims) for t in proto.graph.initializer}
    return {n.input[0] for n in proto.graph.node if n.op_type == "DequantizeLinear" and sizes.get(n.input[1]) == 1}


def _fits(values: np.ndarray, bits: int) -> bool:
    half = 1 << (bits - 1)
    return not values.size or (-half <= int(values.min()) and int(values.max()) < half)


def _four_odd_levels(values: np.ndarray) -> bool:
    """Whether these are the levels -3, -1, 1, 3 of two midrise bits, which INT2 holds only as -2 to 1 and a half."""
    return not _fits(values, 2) and bool((values % 2 == 1).all()) and int(np.abs(values).max()) <= 3


def _add_half(proto: Any, codes: str) -> None:
    """``(2c + 1) * h`` as ``c * 2h + h``: for codes of two bits the same floats, since ``c * 2h`` is exact."""
    onnx = require("onnx")
    stored = {t.name: t for t in proto.graph.initializer}
    nodes = []
    for node in proto.graph.node:
        nodes.append(onnx.NodeProto.FromString(node.SerializeToString()))
        if node.op_type != "DequantizeLinear" or node.input[0] != codes:
            continue
        half = onnx.numpy_helper.to_array(stored[node.input[1]])
        axis = next((a.i for a in node.attribute if a.name == "axis"), 1)
        shape = [-1 if i == axis else 1 for i in range(len(stored[codes].dims))]
        names = (f"{node.input[1]}.doubled", f"{node.input[1]}.half")
        for name, array in zip(names, (2 * half, half.reshape(shape))):
            if name not in stored:
                proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
        result = node.output[0]
        nodes[-1].input[1] = names[0]
        nodes[-1].output[0] = f"{result}.without_half"
        nodes.append(onnx.helper.make_node("Add", [nodes[-1].output[0], names[1]], [result], name=f"{node.name}.half"))
    replace_nodes(proto, nodes, [])


def replace_nodes(proto: Any, nodes: Sequence[Any], more: Sequence[Any]) -> None:
    """Put other nodes into a graph, add initializers and drop those that nothing reads any more."""
    onnx = require("onnx")
    copies = [onnx.NodeProto.FromString(n.SerializeToString()) for n in nodes]
    read = set(read_by(copies))
    del proto.graph.node[:]
    proto.graph.node.extend(copies)
    proto.graph.initializer.extend(more)
    keep_tensors(proto, read)


def keep_tensors(proto: Any, names: Container[str]) -> None:
    """Drop initializers of other names, without a copy of those that stay: they may take gigabytes."""
    stored = proto.graph.initializer
    for index in reversed(range(len(stored))):
        if stored[index].name not in names:
            del stored[index]


def read_by(nodes: Iterable[Any]) -> Iterator[str]:
    """Names that nodes read, also inside of loops and branches."""
    for node in nodes:
        yield from node.input
        for attribute in node.attribute:
            for graph in (attribute.g, *attribute.graphs):
                yield from read_by(graph.node)
                yield from (output.name for output in graph.output)


def _pack(values: np.ndarray, bits: int) -> np.ndarray:
    """Several codes a byte, the first in the lowest bits; the last byte is padded with zeros."""
    each = 8 // bits
    flat = values.reshape(-1).astype(np.uint8) & ((1 << bits) - 1)
    flat = np.pad(flat, (0, -flat.size % each)).reshape(-1, each)
    packed: np.ndarray = np.bitwise_or.reduce(flat << (bits * np.arange(each, dtype=np.uint8)), axis=1)
    return packed.astype(np.uint8)


def _raise_opset(proto: Any, version: int) -> None:
    onnx = require("onnx")
    if onnx.defs.onnx_opset_version() < version:
        raise HawqError(
            f"onnx {onnx.__version__} lacks opset {version}, which two-bit weights need: pip install -U onnx."
        )
    raised = onnx.version_converter.convert_version(proto, version)
    proto.CopyFrom(raised)
    proto.ir_version = max(proto.ir_version, _IR.get(version, 13))
