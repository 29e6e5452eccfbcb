"""QONNX: weights and activations of any width as ``Quant`` nodes, for FPGA flows (FINN, hls4ml).

``Quant(x, scale, zero_point, bits)`` rounds to a grid in float (Pappalardo et al. 2022, "QONNX: Representing
Arbitrary-Precision Quantized Neural Networks"). Its tools take a tensor for integers only where the zero point is 0.
So everything is written with zero point 0: midrise levels as odd integers ``2c + 1``, activations whose codes have a
zero point as signed integers behind a Clip. Either can need a bit more than the plan has; which do is told.

The graph is the unfolded one: BatchNorm with a negative gamma would turn codes round, and ``-2^(b-1)`` would need one
bit more. These tools also want one image at a time.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from hawq_lightning._batches import image_tensors, pieces
from hawq_lightning._errors import HawqError
from hawq_lightning._extra import require
from hawq_lightning._plan import Plan
from hawq_lightning._types import Batch, JsonObject
from hawq_lightning.export._deployed import Inputs, deploy
from hawq_lightning.export._files import check_writable
from hawq_lightning.export.onnx._grids import (
    ActivationGrid,
    Grids,
    WeightGrid,
    fixed_graph,
    signed_bits,
    without_unread,
)
from hawq_lightning.export.onnx._proto import describe, write

FLOAT_BITS = 32
DOMAIN = "qonnx.custom_op.general"
IMAGES = 40  # the executor takes a third of a second for each


@dataclass(frozen=True)
class Widths:
    """What a QONNX file declares.

    Attributes:
        weights: layer -> bits.
        reads: layer -> bits of what it reads; 32 where no quantizer stands before it.
        wider: what has more bits than in the plan -> (bits of the plan, bits declared).
    """

    weights: Mapping[str, int]
    reads: Mapping[str, int]
    wider: Mapping[str, tuple[int, int]] = field(default_factory=dict)


@dataclass(frozen=True)
class QonnxAgreement:
    """A QONNX file run by qonnx's executor, and counted by its ``inference_cost``.

    Attributes:
        images: run.
        same: images with the same top-1 class.
        difference: the greatest absolute difference of an output.
        bops: bit operations an image as qonnx counts them.
        macs: multiply-accumulates an image.
    """

    images: int
    same: int
    difference: float
    bops: int
    macs: int

    def to_dict(self) -> JsonObject:
        """Plain JSON types."""
        return {"images": self.images, "same_top1": self.same, "largest_difference": self.difference,
                "bops": self.bops, "macs": self.macs}  # fmt: skip

    def __str__(self) -> str:
        return (
            f"qonnx's executor agrees on {self.same} of {self.images} images, outputs differ by at most "
            f"{self.difference:.2g}; {self.bops:,} bit operations an image by its count"
        )


def to_qonnx(
    model: nn.Module, plan: Plan | None, example_input: Inputs, path: str | Path, *, free_batch: bool = True
) -> Widths:
    """Write a quantized model as a QONNX file for one image at a time; the model stays as it is.

    Args:
        model: with quantizers enabled.
        plan: the plan that it carries; ``None`` reads it from the quantizers.
        example_input: float images ``[N, C, H, W]``, or a tuple of the model's positional inputs.
        path: of the file; missing folders are made, an old file is replaced atomically.
        free_batch: the first axis of every input holds images, and the file is for one; else it is for the example's
            shapes, as of graphs.

    Returns:
        the widths that the file declares.

    Raises:
        HawqError: as for :func:`hawq_lightning.export.to_onnx`.
    """
    require("onnx")
    require("onnxscript")
    check_writable(Path(path))
    deployed = deploy(model, plan, example_input, fold=False, free_batch=free_batch)
    proto = fixed_graph(deployed.model, deployed.inputs, one_image=free_batch)
    widths = _Rewrite(proto, Grids(proto, model, deployed.plan)).run()
    proto.opset_import.append(require("onnx").helper.make_opsetid(DOMAIN, 1))
    describe(proto, deployed, "qonnx")
    write(proto, Path(path))
    return widths


class _Rewrite:
    """Every DequantizeLinear, with the QuantizeLinear and Clip before it, becomes a Quant."""

    def __init__(self, proto: Any, grids: Grids) -> None:
        self.proto, self.grids, self.onnx = proto, grids, require("onnx")
        self.added: dict[str, Any] = {}
        self.widths: dict[str, int] = {}  # output of a Quant -> bits
        self.wider: dict[str, tuple[int, int]] = {}

    def run(self) -> Widths:
        """Rewrite the graph, in place."""
        readers = self.grids.readers()
        nodes: list[Any] = []
        for node in self.proto.graph.node:
            result = node.output[0]
            if result in self.grids.weights:
                nodes.append(self._weight(self.grids.weights[result]))
            elif result in self.grids.activations:
                nodes += self._activation(self.grids.activations[result])
            else:
                nodes.append(node)
        without_unread(self.proto, nodes, self.added)
        weights, reads = {}, {}
        for _, weight, grid in readers:
            weights[weight.layer] = self.widths[weight.result]
            reads[weight.layer] = FLOAT_BITS if grid is None else self.widths[grid.result]
            if grid is not None and grid.result in self.wider:  # by the layer's name, which a person knows
                self.wider[f"{weight.layer}.input"] = self.wider.pop(grid.result)
        return Widths(weights, reads, self.wider)

    def _weight(self, grid: WeightGrid) -> Any:
        scale = grid.scale.reshape(grid.shape)
        scale = np.where(scale == 0, np.float32(1), scale)  # a dead channel's codes would be 0 / 0
        values = self._keep(f"{grid.result}.weight", grid.values)
        return self._quant(grid.result, values, scale, grid.bits, True, grid.layer, grid.planned)

    def _activation(self, grid: ActivationGrid) -> list[Any]:
        result = grid.result
        if not grid.zero:
            return [self._quant(result, grid.read, grid.scale, grid.bits, False, result, grid.bits)]
        low, high, read, nodes = -grid.zero, (1 << grid.bits) - 1 - grid.zero, grid.read, []
        bits = signed_bits(low, high)
        if (low, high) != (-(1 << (bits - 1)), (1 << (bits - 1)) - 1):
            ends = [
                self._keep(f"{result}.{end}", np.float32(v) * grid.scale) for end, v in (("low", low), ("high", high))
            ]
            nodes = [self.onnx.helper.make_node("Clip", [read, *ends], [f"{result}.clipped"], name=f"{result}.clip")]
            read = f"{result}.clipped"
        return [*nodes, self._quant(result, read, grid.scale, bits, True, result, grid.bits)]

    def _quant(
        self, result: str, read: str, scale: np.ndarray | np.float32, bits: int, signed: bool, name: str, planned: int
    ) -> Any:
        self.widths[result] = bits
        if bits > planned:
            self.wider[name] = (planned, bits)
        parts = {"scale": scale, "zero": np.float32(0), "bits": np.float32(bits)}
        values = [self._keep(f"{result}.{n}", v) for n, v in parts.items()]
        return self.onnx.helper.make_node(
            "Quant", [read, *values], [result], name=f"{result}.quant", domain=DOMAIN,
            signed=int(signed), narrow=0, rounding_mode="ROUND",
        )  # fmt: skip

    def _keep(self, name: str, value: np.ndarray | np.float32) -> str:
        self.added[name] = self.onnx.numpy_helper.from_array(np.asarray(value, np.float32), name)
        return name


@torch.no_grad()
def compare_qonnx(
    model: nn.Module, path: str | Path, batches: Iterable[Batch], images: int | None = None
) -> QonnxAgreement:
    """Run a QONNX file with qonnx's executor beside the quantized model, as many images at a time as the file takes.

    Args:
        model: the fake-quant model that was exported; class logits first.
        path: written by :func:`to_qonnx`.
        batches: tensors, or batches with the images first.
        images: stop after so many, and after 40 in any case.

    Raises:
        HawqError: no images, the extra ``qonnx`` is missing, or qonnx cannot run the file.
    """
    wrapper = require("qonnx.core.modelwrapper").ModelWrapper
    execute = require("qonnx.core.onnx_exec").execute_onnx
    shapes = require("qonnx.transformation.infer_shapes").InferShapes
    cost = require("qonnx.util.inference_cost").inference_cost
    count = min(IMAGES, IMAGES if images is None else images)
    model = model.eval()
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    expected: list[np.ndarray] = []
    actual: list[np.ndarray] = []
    try:
        file = wrapper(str(path)).transform(shapes())
        takes, gives = (file.graph.input[0], file.graph.output[0].name)
        size = takes.type.tensor_type.shape.dim[0].dim_value
        for images_at_once in pieces(image_tensors(batches, count), size):
            first = torch.utils._pytree.tree_leaves(model(images_at_once.to(device)))[0]
            expected += list(first.float().cpu().numpy())
            actual += list(execute(file, {takes.name: images_at_once.cpu().float().numpy()})[gives])
        counted = cost(str(path), discount_sparsity=False)["total_cost"]
    except HawqError:
        raise
    except Exception as error:
        line = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise HawqError(f"qonnx cannot run {path}: {line}") from error
    if not actual:
        raise HawqError("There are no images to compare on.")
    pairs = list(zip(expected, actual))
    same = sum(int(np.array_equal(e.argmax(0), a.argmax(0))) for e, a in pairs)
    difference = max(float(np.abs(e - a).max(initial=0)) for e, a in pairs)
    return QonnxAgreement(len(pairs), same, difference, int(counted["total_bops"]), int(counted["total_macs"]))
