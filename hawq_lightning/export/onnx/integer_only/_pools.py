"""Means over windows and over axes as INT32 sums, and nearest neighbours."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from hawq_lightning.export.onnx.integer import Node
from hawq_lightning.export.onnx.integer_only._reading import Reading, refusal
from hawq_lightning.export.onnx.integer_only._steps import LARGEST, AxisSum, Move, WindowSum
from hawq_lightning.export.onnx.integer_only._values import Integers, Real, Term
from hawq_lightning.export.onnx.integer_only._windows import window_of


def mean(reading: Reading, node: Node) -> Real:
    """Means and sums over whole axes."""
    term, shape = _pooled(reading, node)
    rank = len(shape)
    if node.op_type == "GlobalAveragePool":
        axes, keep = list(range(2, rank)), True
    else:
        given = reading.constant(node.input[1]) if len(node.input) > 1 and node.input[1] else None
        listed = reading.graph.attribute(node, "axes") if given is None else given.reshape(-1).tolist()
        axes = sorted(int(a) % rank for a in (range(rank) if listed is None else listed))
        keep = bool(reading.graph.attribute(node, "keepdims", 1))
    sizes = [shape[a] for a in axes]
    if 0 in axes or any(n is None for n in sizes):
        raise refusal(node, "the number of elements that it sums is not known")
    count = int(np.prod([n for n in sizes if n is not None]))
    step = AxisSum(f"{node.output[0]}//sums", (term.tensor,), term.zero, tuple(axes), keep)
    return _averaged(reading, node, step, term, count, np.asarray(1.0 if node.op_type == "ReduceSum" else count))


def average(reading: Reading, node: Node) -> Real:
    """Means over windows; those at the border can count fewer elements."""
    term, shape = _pooled(reading, node)
    kernel = [int(k) for k in reading.graph.attribute(node, "kernel_shape")]
    known = [n for n in shape[1:] if n is not None]
    if len(known) != len(kernel) + 1:
        raise refusal(node, "the size of what it reads is not known")
    if not reading.integers[term.tensor].byte:
        raise refusal(node, "what it reads has no grid")
    size = known[1:]
    attributes = reading.attributes(node)
    window = window_of(kernel, len(kernel), attributes, size)
    inside = np.ones((1, 1, *size), np.int64)
    if attributes.get("count_include_pad"):
        plain = window_of(kernel, len(kernel), {**attributes, "ceil_mode": 0}, size)
        dims = len(kernel)
        around = [(0, 0), (0, 0), *zip(plain.pads[:dims], plain.pads[dims:])]
        padded = np.pad(inside, around, constant_values=1)
        pads = tuple(a - b for a, b in zip(window.pads, plain.pads))
        counts = replace(window, pads=pads).view(padded)
    else:
        counts = window.view(inside)
    counts = counts.sum(tuple(range(-len(kernel), 0)))[0, 0]
    number = counts.astype(np.float64) if counts.min() != counts.max() else np.asarray(float(counts.flat[0]))
    step = WindowSum(f"{node.output[0]}//sums", (term.tensor,), term.zero, window, tuple(known))
    return _averaged(reading, node, step, term, int(np.prod(kernel)), number)


def _pooled(reading: Reading, node: Node) -> tuple[Term, list[int | None]]:
    term, shape = reading.real(node.input[0], node).single, reading.sizes.get(node.input[0])
    if term is None:
        raise refusal(node, "what it reads has no grid")
    if shape is None:
        raise refusal(node, "the axes of what it reads are not known")
    return term, shape


def _averaged(
    reading: Reading, node: Node, step: AxisSum | WindowSum, term: Term, count: int, number: np.ndarray
) -> Real:
    held = reading.integers[term.tensor]
    ends = (min(0, held.low - term.zero) * count, max(0, held.high - term.zero) * count)
    if max(map(abs, ends)) > LARGEST:
        raise refusal(node, f"its sums reach {max(map(abs, ends)):,}, which INT32 does not hold")
    reading.emit(step, Integers(*ends))
    return Real((Term(step.result, 0, term.scale / number),), np.zeros(()))


def nearest(reading: Reading, node: Node) -> Real:
    """A Resize that repeats every element: new axes, expanded and joined with the old ones."""
    term, shape = _pooled(reading, node)
    given = {k: v.decode() if isinstance(v, bytes) else v for k, v in reading.attributes(node).items()}
    made = reading.sizes.get(node.output[0]) or [None]
    repeats = given.get("mode", "nearest") == "nearest" and (
        given.get("nearest_mode", "round_prefer_floor") == "floor"
        if given.get("coordinate_transformation_mode", "half_pixel") == "asymmetric"
        else given.get("coordinate_transformation_mode", "half_pixel") in ("half_pixel", "pytorch_half_pixel")
    )
    old, new = [n for n in shape[1:] if n], [n for n in made[1:] if n]
    if not repeats or len(old) != len(shape) - 1 or len(new) != len(old) or any(b % a for a, b in zip(old, new)):
        raise refusal(node, "it does not repeat each element the same number of times")
    split: list[int] = [-1]
    wide: list[int] = [1]
    for a, b in zip(old, new):
        split += [a, 1]
        wide += [1, b // a]
    name = node.output[0]
    read = term.tensor
    for op, numbers in (("Reshape", split), ("Expand", wide), ("Reshape", [-1, *new])):
        result, shape_name = f"{name}//{op}{len(numbers)}", f"{name}//{op}{len(numbers)}/shape"
        fixed = {shape_name: np.asarray(numbers, np.int64)}
        read = reading.emit(Move(result, (read, shape_name), op, {}, fixed), reading.integers[read])
    return Real((Term(read, term.zero, term.scale),), np.zeros(()))
