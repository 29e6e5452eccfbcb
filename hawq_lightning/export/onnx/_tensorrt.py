"""ONNX in TensorRT's explicit form: INT8 codes with zero point 0 throughout. Written by what is known of it, no GPU.

TensorRT refuses UINT8 activations and any zero point but 0. So a grid of ``(code - zero) * scale`` becomes the
symmetric one over its range, with 127 steps on each side: one that begins at 0 keeps half of its steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import nn

from hawq_lightning._errors import HawqError
from hawq_lightning._extra import require
from hawq_lightning._plan import Plan
from hawq_lightning.export._deployed import Deployed, Inputs, deploy
from hawq_lightning.export._files import check_writable
from hawq_lightning.export.onnx._low_bits import weights
from hawq_lightning.export.onnx._proto import describe, write
from hawq_lightning.export.onnx._storage import store_weights
from hawq_lightning.export.onnx._translate import tell_fixed_axis, translated
from hawq_lightning.export.onnx.integer import Graph

_SIDE = 127  # steps on each side of 0


@dataclass(frozen=True)
class SymmetricFile:
    """What was written.

    Attributes:
        deployed: the network that it was made of.
        scales: float tensor that a grid rounds -> step of its symmetric grid.
    """

    deployed: Deployed
    scales: Mapping[str, float]


def to_tensorrt(
    model: nn.Module,
    plan: Plan | None,
    example_input: Inputs,
    path: str | Path,
    *,
    fold: bool = True,
    free_batch: bool = True,
) -> SymmetricFile:
    """Write a quantized model with symmetric grids, TensorRT's explicit form; the model stays as it is.

    Untested on a GPU: onnx's checker and onnxruntime have read such files, TensorRT has not. Grids of fewer than 8 bits
    become 8-bit ones over their range, and biases stay float.

    Args:
        model: with quantizers enabled.
        plan: the plan that it carries; ``None`` reads it from the quantizers.
        example_input: float images ``[N, C, H, W]``, or a tuple of the model's positional inputs.
        path: of the file; missing folders are made, an old file is replaced atomically.
        fold: fold BatchNorm into scales and biases.
        free_batch: let the first axis of every input be of any size.

    Raises:
        HawqError: a weight has midrise levels of 8 bits, which INT8 does not hold, or as for
            :func:`hawq_lightning.export.to_onnx`.
    """
    onnx = require("onnx")
    require("onnxscript")
    check_writable(Path(path))
    deployed = deploy(model, plan, example_input, fold=fold, free_batch=free_batch)
    proto = translated(deployed.model, deployed.inputs, free_batch)
    if free_batch:
        tell_fixed_axis(proto, path)
    if wide := [t.name for t in weights(proto) if t.data_type != onnx.TensorProto.INT8]:
        raise HawqError(
            f"TensorRT has INT8 weights; {wide[0]!r} has midrise levels of 8 bits, which need one bit more."
        )
    graph = Graph(proto)
    scales = _symmetric(graph)
    graph.store()
    store_weights(proto, "int8", exact=False)
    describe(proto, deployed, "tensorrt")
    write(proto, Path(path))
    return SymmetricFile(deployed, scales)


def _symmetric(graph: Graph) -> dict[str, float]:
    """Replace the activations' grids, in place."""
    makers = graph.makers()
    found: dict[str, float] = {}
    zero = graph.constant("//zero/int8", np.asarray(0, np.int8))
    for node in list(graph.nodes):
        codes = makers.get(node.input[0]) if node.op_type == "DequantizeLinear" else None
        if codes is None:
            continue
        top, clip = 255, codes if codes.op_type == "Clip" else None
        if clip is not None:
            top, codes = int(graph.array(clip.input[2])), makers[clip.input[0]]
        if codes.op_type != "QuantizeLinear":
            continue
        scale, middle = float(graph.array(codes.input[1])), int(graph.array(codes.input[2]))
        step = np.float32(max(middle, top - middle) * scale / _SIDE)
        name = graph.constant(f"//step/{step.view(np.uint32):x}", np.asarray(step))
        found[codes.input[0]] = float(step)
        codes.input[1:] = [name, zero]
        node.input[:] = [codes.output[0], name, zero]
        if clip is not None:
            graph.drop([clip])
    return found
