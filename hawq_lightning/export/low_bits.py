"""Narrowing the weights of an ONNX graph: INT8 and INT16 initializers become the narrowest type that holds them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from hawq_lightning.errors import HawqError
from hawq_lightning.export.extra import require

INT2_OPSET = 25
# IR versions that came with the opsets
_IR = {21: 10, 25: 13}


def narrow(proto: Any) -> dict[str, str]:
    """Store every weight behind a DequantizeLinear in INT2, INT4, INT8 or INT16, in place.

    Args:
        proto: an ONNX model of opset 21 or later.

    Returns:
        initializer -> its type.

    Raises:
        HawqError: a two-bit type is needed and the installed onnx has none.
    """
    onnx = require("onnx")
    types = {}
    for tensor in weights(proto):
        values = onnx.numpy_helper.to_array(tensor).astype(np.int16)
        low, high = (int(values.min()), int(values.max())) if values.size else (0, 0)
        bits = next(b for b in (2, 4, 8, 16) if -(1 << (b - 1)) <= low and high < 1 << (b - 1))
        types[tensor.name] = f"INT{bits}"
        kind = getattr(onnx.TensorProto, f"INT{bits}", None)
        if kind is None:
            raise HawqError(
                f"onnx {onnx.__version__} has no INT{bits}: pip install 'onnx>=1.20', or use 3 bits or more."
            )
        name, shape = tensor.name, list(tensor.dims)
        if bits < 8:
            packed = _pack(values, bits)
            tensor.CopyFrom(onnx.helper.make_tensor(name, kind, shape, packed.tobytes(), raw=True))
        else:
            tensor.CopyFrom(onnx.numpy_helper.from_array(values.astype(f"int{bits}"), name))
    if "INT2" in types.values():
        _raise_opset(proto, INT2_OPSET)
    return types


def weights(proto: Any) -> Iterator[Any]:
    """The initializers that a DequantizeLinear reads as codes, each once."""
    stored = {t.name: t for t in proto.graph.initializer}
    seen = set()
    for node in proto.graph.node:
        if node.op_type == "DequantizeLinear" and node.input[0] in stored and node.input[0] not in seen:
            seen.add(node.input[0])
            yield stored[node.input[0]]


def _pack(values: np.ndarray, bits: int) -> np.ndarray:
    """Several codes a byte, the first in the lowest bits; the last byte is padded with zeros."""
    each = 8 // bits
    flat = values.reshape(-1).astype(np.uint8) & ((1 << bits) - 1)
    flat = np.pad(flat, (0, -flat.size % each)).reshape(-1, each)
    return np.bitwise_or.reduce(flat << (bits * np.arange(each, dtype=np.uint8)), axis=1).astype(np.uint8)


def _raise_opset(proto: Any, version: int) -> None:
    onnx = require("onnx")
    if onnx.defs.onnx_opset_version() < version:
        raise HawqError(
            f"onnx {onnx.__version__} lacks opset {version}, which two-bit weights need: pip install -U onnx."
        )
    raised = onnx.version_converter.convert_version(proto, version)
    proto.CopyFrom(raised)
    proto.ir_version = max(proto.ir_version, _IR.get(version, 13))
