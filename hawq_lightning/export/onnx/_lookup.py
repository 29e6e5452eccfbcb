"""Packed codes that every runtime unpacks when it loads: bytes choose rows of a table of codes.

``UINT8 -> Cast -> Gather(table) -> Reshape`` is opset 13 and constant, so that runtimes fold it into INT8 codes once. A
row holds the codes of one byte: eight of one bit, four of two, two of four. Widths that do not divide a byte take 9, 10
or 12 bits a row: three codes of three bits, two of five, two of six; the bits above the byte are packed by themselves
and looked up in the same way.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from hawq_lightning._extra import require
from hawq_lightning.export.onnx._low_bits import keep_tensors, replace_nodes, weights

# code width -> codes a row
_ROW = {1: 8, 2: 4, 3: 3, 4: 2, 5: 2, 6: 2, 8: 1}
_WIDER = {1: 2, 2: 4, 3: 4, 4: 8, 5: 8, 6: 8, 7: 8}
_NODE_BYTES = 250  # about, of the nodes and names that one packed weight needs


@dataclass(frozen=True)
class Levels:
    """What codes of a width stand for.

    Attributes:
        bits: width.
        odd: ``2c + 1 - 2^b``, the midrise levels, in the place of ``c - 2^(b-1)``.
    """

    bits: int
    odd: bool

    @property
    def values(self) -> np.ndarray:
        """Of every code in turn."""
        codes = np.arange(1 << self.bits)
        return 2 * codes + 1 - (1 << self.bits) if self.odd else codes - (1 << (self.bits - 1))

    @property
    def row_bits(self) -> int:
        """Bits that choose a row."""
        return self.bits * _ROW[self.bits]

    def codes(self, values: np.ndarray) -> np.ndarray:
        """Codes of values, flat."""
        flat = values.reshape(-1).astype(np.int64)
        half = 1 << (self.bits - 1)
        return (flat - 1) // 2 + half if self.odd else flat + half

    def table(self) -> np.ndarray:
        """A row of values for every choice; INT8, or INT32 where eight odd bits do not fit."""
        rows = np.arange(1 << self.row_bits)[:, None] >> (self.bits * np.arange(_ROW[self.bits]))
        found: np.ndarray = self.values[rows & ((1 << self.bits) - 1)]
        return found.astype(np.int32 if self.odd and self.bits == 8 else np.int8)


def look_up_weights(proto: Any) -> dict[str, int]:
    """Pack every weight behind a DequantizeLinear as bytes and a table, in place, where that saves space.

    Args:
        proto: an ONNX model whose codes are INT8 or INT16 initializers.

    Returns:
        initializer -> bits that a code takes in the file.
    """
    onnx = require("onnx")
    arrays = {t.name: onnx.numpy_helper.to_array(t) for t in weights(proto)}
    chosen = _worth_it({name: levels_of(values) for name, values in arrays.items() if values.size}, arrays)
    nodes: list[Any] = []
    tensors: dict[str, Any] = {}
    for name, levels in chosen.items():
        nodes += _unpacked(name, arrays[name], levels, tensors)
    keep_tensors(proto, {t.name for t in proto.graph.initializer} - set(chosen))
    replace_nodes(proto, [*nodes, *proto.graph.node], [onnx.numpy_helper.from_array(a, n) for n, a in tensors.items()])
    return {n: chosen[n].bits if n in chosen else 8 * arrays[n].itemsize for n in arrays}


def levels_of(values: np.ndarray) -> Levels:
    """The narrowest levels that hold integers."""
    low, high = int(values.min()), int(values.max())
    odd = bool((values % 2 != 0).all())
    for bits in range(1, 9):
        half = 1 << (bits - 1)
        if odd and max(-low, high) < 2 * half:
            return Levels(bits, True)
        if -half <= low and high < half:
            return Levels(bits, False)
    raise AssertionError(f"codes from {low} to {high} have more than 8 bits")


def _worth_it(found: Mapping[str, Levels], arrays: Mapping[str, np.ndarray]) -> dict[str, Levels]:
    """The narrowest widths whose tables are not larger than what they save."""
    found = {n: x if x.bits in _ROW else Levels(_WIDER[x.bits], x.odd) for n, x in found.items()}
    for bits in (1, 2, 3, 5, 6, 4):  # four is where three goes
        for odd in (False, True):
            held = [n for n, x in found.items() if x == Levels(bits, odd)]
            saved = sum(arrays[n].size * (_WIDER[bits] - bits) // 8 for n in held)
            costs = _ROW[bits] << Levels(bits, odd).row_bits
            if _WIDER[bits] == 8:
                costs += _NODE_BYTES * len(held)
            if held and saved <= costs:
                found |= {n: Levels(_WIDER[bits], odd) for n in held}
    # eight bits are as small as they are, but for odd ones, which no type of a byte holds
    return {n: x for n, x in found.items() if x.bits < 8 or arrays[n].itemsize > 1}


def _unpacked(name: str, values: np.ndarray, levels: Levels, tensors: dict[str, Any]) -> Iterable[Any]:
    """Nodes that make ``values`` under ``name``; what they read goes into ``tensors``."""
    onnx = require("onnx")
    make, integer = onnx.helper.make_node, onnx.TensorProto.INT32
    rows = _rows(levels, values)
    table = f"//levels/{levels.bits}{'odd' if levels.odd else ''}"
    tensors[table] = levels.table()
    tensors[f"{name}.packed"] = (rows & 255).astype(np.uint8)
    index = f"{name}.row"
    nodes = [make("Cast", [f"{name}.packed"], [index], name=f"{name}.cast", to=integer)]
    if extra := levels.row_bits - 8:
        each = 8 // extra
        high = (rows >> 8).reshape(-1, each) << (extra * np.arange(each))
        tensors[f"{name}.high"] = high.sum(1).astype(np.uint8)
        fields = (np.arange(256)[:, None] >> (extra * np.arange(each))) & ((1 << extra) - 1)
        tensors[f"//high/{extra}"] = (fields << 8).astype(np.int32)
        tensors["//flat"] = np.asarray([-1], np.int64)
        nodes += [
            make("Cast", [f"{name}.high"], [f"{name}.high_row"], name=f"{name}.high_cast", to=integer),
            make("Gather", [f"//high/{extra}", f"{name}.high_row"], [f"{name}.above"], name=f"{name}.high_gather"),
            make("Reshape", [f"{name}.above", "//flat"], [f"{name}.above_flat"], name=f"{name}.high_reshape"),
            make("Add", [index, f"{name}.above_flat"], [f"{name}.whole_row"], name=f"{name}.high_add"),
        ]
        index = f"{name}.whole_row"
    result = f"{name}.rows"
    nodes.append(make("Gather", [table, index], [result], name=f"{name}.gather"))
    if len(rows) * _ROW[levels.bits] != values.size:
        tensors["//flat"] = np.asarray([-1], np.int64)
        tensors["//begin"], tensors[f"{name}.end"] = np.asarray([0], np.int64), np.asarray([values.size], np.int64)
        nodes += [
            make("Reshape", [result, "//flat"], [f"{name}.flat"], name=f"{name}.flatten"),
            make("Slice", [f"{name}.flat", "//begin", f"{name}.end"], [f"{name}.cut"], name=f"{name}.slice"),
        ]
        result = f"{name}.cut"
    shape = "//".join(("shape", *map(str, values.shape)))
    tensors[shape] = np.asarray(values.shape, np.int64)
    return [*nodes, make("Reshape", [result, shape], [name], name=f"{name}.reshape")]


def _rows(levels: Levels, values: np.ndarray) -> np.ndarray:
    """Row of the table for every group of codes, the first code in the lowest bits; padded to whole bytes."""
    each, extra = _ROW[levels.bits], levels.row_bits - 8
    codes = levels.codes(values)
    codes = np.pad(codes, (0, -codes.size % (each * (8 // extra if extra else 1)))).reshape(-1, each)
    rows: np.ndarray = (codes << (levels.bits * np.arange(each))).sum(1)
    assert rows.max(initial=0) < 1 << levels.row_bits and math.prod(values.shape) <= codes.size
    return rows
