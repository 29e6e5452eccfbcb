"""AIMET encodings: the grids of a network as JSON beside its float ONNX graph, for Qualcomm's QNN and SNPE.

The 1.0.0 form is a list of objects, the 0.6.1 form lists one object a channel under each tensor's name; both name
offsets for unsigned codes: ``value = (code + offset) * scale``. Weights are symmetric, so their offset is
``-2^(bits-1)`` whatever the grid holds; midrise levels are odd integers, with a bit more than in the plan.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from hawq_lightning._extra import require
from hawq_lightning._io import json_text, write_text
from hawq_lightning._plan import Plan
from hawq_lightning._types import JsonObject
from hawq_lightning.export._deployed import Inputs, deploy
from hawq_lightning.export._files import check_writable
from hawq_lightning.export._positive import positive_scales
from hawq_lightning.export.onnx._grids import ActivationGrid, Grids, WeightGrid, fixed_graph, without_unread
from hawq_lightning.export.onnx._proto import describe, write

BESIDE = (".encodings", ".0_6_1.encodings")


@dataclass(frozen=True)
class Encodings:
    """What was written.

    Attributes:
        weights: name of each weight in the ONNX graph -> bits.
        activations: name of each tensor with a grid -> bits.
        clamped: layer -> codes that a negative scale had turned to ``+2^(bits-1)`` and that are one less now.
    """

    weights: Mapping[str, int]
    activations: Mapping[str, int]
    clamped: Mapping[str, int]


def to_aimet(
    model: nn.Module,
    plan: Plan | None,
    example_input: Inputs,
    path: str | Path,
    *,
    fold: bool = True,
    free_batch: bool = True,
) -> Encodings:
    """Write a float ONNX graph and its encodings, ``.encodings`` (1.0.0) and ``.0_6_1.encodings`` beside it.

    A grid stands on the tensor itself, so that whatever else reads the tensor, such as a shortcut, reads the grid too;
    integer hardware has it no other way.

    Args:
        model: with quantizers enabled; it stays as it is.
        plan: the plan that it carries; ``None`` reads it from the quantizers.
        example_input: float images ``[N, C, H, W]``, or a tuple of the model's positional inputs.
        path: of the ONNX file; missing folders are made, old files are replaced atomically.
        fold: fold BatchNorm into scales and biases, as QNN's converter does. Where that makes a scale negative, its
            codes change sign, and ``-2^(bits-1)`` becomes one step less than it should be.
        free_batch: the first axis of every input holds images, and the graph is for one; else it is for the example's
            shapes, as of graphs.

    Raises:
        HawqError: as for :func:`hawq_lightning.export.to_onnx`.
    """
    require("onnx")
    require("onnxscript")
    files = [Path(path), *(Path(path).with_suffix(suffix) for suffix in BESIDE)]
    for file in files:
        check_writable(file)
    deployed = deploy(model, plan, example_input, fold=fold, free_batch=free_batch)
    proto = fixed_graph(deployed.model, deployed.inputs, one_image=free_batch)
    grids = Grids(proto, model, deployed.plan)
    weights, activations, clamped = _plain_graph(proto, grids)
    describe(proto, deployed, "aimet")
    forms = (_form_1_0_0(weights, activations), _form_0_6_1(weights, activations))
    write(proto, files[0])
    for file, form in zip(files[1:], forms):
        write_text(file, json_text(form, indent=1))
    return Encodings({k: g.bits for k, g in weights.items()}, {k: g.bits for k, g in activations.items()}, clamped)


def _plain_graph(proto: Any, grids: Grids) -> tuple[dict[str, WeightGrid], dict[str, ActivationGrid], dict[str, int]]:
    """Float weights in the place of codes, tensors in the place of their grids."""
    onnx = require("onnx")
    weights: dict[str, WeightGrid] = {}
    clamped: dict[str, int] = {}
    added, rename = {}, {}
    for result, grid in grids.weights.items():
        codes, scale, count = positive_scales(grid.codes, grid.scale, grid.axis, grid.bits)
        if count:
            clamped[grid.layer] = count
        name = f"{grid.layer}.weight" if f"{grid.layer}.weight" not in weights else f"{result}.weight"
        weights[name] = WeightGrid(grid.layer, result, codes, scale, grid.axis, grid.planned, grid.bits)
        added[name] = onnx.numpy_helper.from_array(weights[name].values, name)
        rename[result] = name
    rename |= {result: grid.read for result, grid in grids.activations.items()}
    nodes = []
    for node in proto.graph.node:
        if node.output[0] in rename:
            continue
        for i, name in enumerate(node.input):
            while name in rename:
                name = rename[name]
            node.input[i] = name
        nodes.append(node)
    without_unread(proto, nodes, added)
    return weights, {g.read: g for g in grids.activations.values()}, clamped


def _form_1_0_0(weights: Mapping[str, WeightGrid], activations: Mapping[str, ActivationGrid]) -> JsonObject:
    params = [
        {"name": name, "dtype": "INT", "bw": g.bits, "is_sym": True, "enc_type": "PER_CHANNEL",
         "scale": _positive(g.scale), "offset": [-(1 << (g.bits - 1))] * len(g.scale)}
        for name, g in weights.items()
    ]  # fmt: skip
    tensors = [
        {"name": name, "dtype": "INT", "bw": g.bits, "is_sym": False, "enc_type": "PER_TENSOR",
         "scale": [float(g.scale)], "offset": [-g.zero]}
        for name, g in activations.items()
    ]  # fmt: skip
    return {"version": "1.0.0", "activation_encodings": tensors, "param_encodings": params,
            "excluded_layers": [], "producer": "hawq_lightning"}  # fmt: skip


def _form_0_6_1(weights: Mapping[str, WeightGrid], activations: Mapping[str, ActivationGrid]) -> JsonObject:
    def entry(scale: float, offset: int, bits: int, symmetric: bool) -> JsonObject:
        low, high = offset * scale, (offset + (1 << bits) - 1) * scale
        return {"min": low, "max": high, "scale": scale, "offset": offset, "bitwidth": bits, "dtype": "int",
                "is_symmetric": str(symmetric)}  # fmt: skip

    params = {k: [entry(s, -(1 << (g.bits - 1)), g.bits, True) for s in _positive(g.scale)] for k, g in weights.items()}
    tensors = {k: [entry(float(g.scale), -g.zero, g.bits, False)] for k, g in activations.items()}
    return {"version": "0.6.1", "activation_encodings": tensors, "param_encodings": params,
            "quantizer_args": {}}  # fmt: skip


def _positive(scale: np.ndarray) -> list[float]:
    """A dead channel has codes of no value: any scale will do."""
    return [float(s) if s else 1.0 for s in scale.reshape(-1)]
