"""Convolutions and linear layers as INT32 sums."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hawq_lightning.export.onnx.integer import Node
from hawq_lightning.export.onnx.integer_only._reading import Reading, refusal
from hawq_lightning.export.onnx.integer_only._steps import LARGEST, Convolution, Move, Product
from hawq_lightning.export.onnx.integer_only._values import Integers, Real, Stored, Term
from hawq_lightning.export.onnx.integer_only._windows import Window, window_of


def convolution(reading: Reading, node: Node) -> Real:
    """A Conv."""
    term, weight = _operands(reading, node)
    if weight.scale.size > 1 and weight.axis != 0:
        raise refusal(node, "its scales are not one for each channel that it gives")
    attributes, rank = reading.attributes(node), weight.codes.ndim - 2
    try:
        size = reading.sizes.get(node.input[0], [])[2:]
        known = [n for n in size if n is not None]
        window = window_of(weight.codes.shape[2:], rank, attributes, known if len(known) == rank else None)
    except ValueError as error:
        raise refusal(node, str(error)) from error
    scale = term.scale * (weight.scale if weight.scale.size == 1 else weight.scale.reshape(-1, *[1] * rank))
    bias, rest = _bias(reading, node, scale, rank)
    held = _sums(reading, node, term, weight.codes.reshape(len(weight.codes), -1), bias)
    groups = int(reading.graph.attribute(node, "group", 1))
    step = Convolution(f"{node.output[0]}//sums", (term.tensor,), term.zero, weight.codes, bias, window, groups)
    return Real((Term(reading.emit(step, held), 0, scale),), rest)


def transposed(reading: Reading, node: Node) -> Real:
    """A ConvTranspose: a convolution of the turned kernel over the codes, spread with codes of 0 between them."""
    term, weight = _operands(reading, node)
    attributes, size = reading.attributes(node), reading.sizes.get(node.input[0], [])
    known, rank = [n for n in size[1:] if n is not None], weight.codes.ndim - 2
    if len(known) != rank + 1 or attributes.get("auto_pad", b"NOTSET") != b"NOTSET" or "output_shape" in attributes:
        raise refusal(node, "its padding is not given by numbers")
    channels, *positions = known
    kernel = weight.codes.shape[2:]

    def numbers(name: str, default: int, count: int) -> list[int]:
        given = attributes.get(name, [default] * count)
        assert isinstance(given, list)
        return [int(n) for n in given]

    strides, dilations = numbers("strides", 1, rank), numbers("dilations", 1, rank)
    pads, more = numbers("pads", 0, 2 * rank), numbers("output_padding", 0, rank)
    reach = [(k - 1) * d for k, d in zip(kernel, dilations)]
    around = [*(r - p for r, p in zip(reach, pads)), *(r - p + m for r, p, m in zip(reach, pads[rank:], more))]
    if min(around) < 0:
        raise refusal(node, "it cuts off more than its kernel reaches")
    groups = int(reading.graph.attribute(node, "group", 1))
    # [C, C_out / groups, kernel ...] -> [C_out, C / groups, kernel ...], turned round
    codes = weight.codes.reshape(groups, channels // groups, -1, *kernel).swapaxes(1, 2)
    codes = np.flip(codes.reshape(-1, channels // groups, *kernel), tuple(range(2, 2 + rank)))
    own = weight.scale
    if own.size > 1:
        if weight.axis != 1:
            raise refusal(node, "its scales are not one for each channel that it gives")
        own = np.tile(own, groups).reshape(-1, *[1] * rank)
    scale = term.scale * own
    bias, rest = _bias(reading, node, scale, rank)
    held = _sums(reading, node, term, codes.reshape(len(codes), -1), bias)
    spread = _spread(reading, node, term, channels, positions, strides)
    window = Window(tuple(kernel), (1,) * rank, tuple(dilations), tuple(around))
    step = Convolution(f"{node.output[0]}//sums", (spread,), term.zero, codes, bias, window, groups)
    return Real((Term(reading.emit(step, held), 0, scale),), rest)


def _spread(
    reading: Reading, node: Node, term: Term, channels: int, positions: Sequence[int], strides: Sequence[int]
) -> str:
    """The codes with ``stride - 1`` codes of 0 behind each along every axis but behind the last."""
    if set(strides) == {1}:
        return term.tensor
    split, pads, joined, ends = [-1, channels], [0, 0], [-1, channels], []
    for n, s in zip(positions, strides):
        split += [n, 1]
        pads += [0, s - 1]
        joined.append(n * s)
        ends.append(n * s - s + 1)
    rank, read, name = len(strides), term.tensor, f"{node.output[0]}//spread"
    axes = np.arange(2, 2 + rank)
    for op, constants in (
        ("Reshape", [np.asarray(split)]),
        ("Pad", [np.asarray([0] * len(pads) + pads), np.asarray(term.zero, np.uint8)]),
        ("Reshape", [np.asarray(joined)]),
        ("Slice", [np.zeros(rank, np.int64), np.asarray(ends), axes]),
    ):
        result = f"{name}/{op}{len(reading.steps)}"
        fixed = {f"{result}/{i}": c if c.dtype == np.uint8 else c.astype(np.int64) for i, c in enumerate(constants)}
        read = reading.emit(Move(result, (read, *fixed), op, {}, fixed), reading.integers[read])
    return read


def linear(reading: Reading, node: Node) -> Real:
    """A Gemm, or a MatMul with a stored weight."""
    term, weight = _operands(reading, node)
    attribute = reading.graph.attribute
    if attribute(node, "transA", 0) or any(attribute(node, k, 1.0) != 1.0 for k in ("alpha", "beta")):
        raise refusal(node, "its operand is transposed or scaled")
    codes, axis = weight.codes, weight.axis
    if codes.ndim != 2:
        raise refusal(node, "its weight has not two axes")
    if attribute(node, "transB", 0):
        codes, axis = codes.T, 1 - axis
    if weight.scale.size > 1 and axis != 1:
        raise refusal(node, "its scales are not one for each channel that it gives")
    scale = term.scale * weight.scale
    scale = scale.reshape(()) if scale.size == 1 else scale
    bias, rest = _bias(reading, node, scale, 0)
    held = _sums(reading, node, term, codes.T, bias)
    step = Product(f"{node.output[0]}//sums", (term.tensor,), term.zero, np.ascontiguousarray(codes), bias)
    return Real((Term(reading.emit(step, held), 0, scale),), rest)


def _operands(reading: Reading, node: Node) -> tuple[Term, Stored]:
    weight = reading.values.get(node.input[1])
    if not isinstance(weight, Stored):
        two = reading.constant(node.input[1]) is None
        raise refusal(node, "a product of two activations" if two else "its weight is no integer")
    term = reading.real(node.input[0], node).single
    if term is None or not reading.integers[term.tensor].byte:
        raise refusal(node, "what it reads has no grid")
    return term, weight


def _bias(reading: Reading, node: Node, scale: np.ndarray, rank: int) -> tuple[np.ndarray | None, np.ndarray]:
    """INT32 bias of the sums' own scale, and what is added to the real numbers otherwise."""
    name = node.input[2] if len(node.input) > 2 else ""
    if not name:
        return None, np.zeros(())
    stored, number = reading.values.get(name), reading.constant(name)
    if isinstance(stored, Stored):
        if np.allclose(stored.scale, scale.reshape(-1), rtol=1e-5, atol=0):
            return stored.codes.astype(np.int32), np.zeros(())
        number = stored.values
    if number is None:
        raise refusal(node, "its bias is computed")
    return None, number.astype(np.float64).reshape(-1, *[1] * rank)


def _sums(reading: Reading, node: Node, term: Term, rows: np.ndarray, bias: np.ndarray | None) -> Integers:
    """The range of ``rows @ (x - zero) + bias``, a row a channel."""
    held = reading.integers[term.tensor]
    low, high = min(0, held.low - term.zero), max(0, held.high - term.zero)  # 0 lies around an image
    rows = rows.astype(np.int64)
    up, down = np.maximum(rows, 0).sum(1), np.minimum(rows, 0).sum(1)
    more = np.zeros(len(rows), np.int64) if bias is None else bias.astype(np.int64)
    most = Integers(int((up * low + down * high + more).min()), int((up * high + down * low + more).max()))
    if most.reach > LARGEST:
        raise refusal(node, f"its sums reach {most.reach:,}, which INT32 does not hold")
    return most
