"""How a program of integers differs from onnxruntime's integer kernels, which multiply by float scales.

Both round every tensor to the same grids. A code can differ where a float product and a dyadic one lie on two sides of
a boundary, and from there on more of them. So codes are compared twice: from the images, and one step at a time from
onnxruntime's own codes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from hawq_lightning._batches import image_tensors
from hawq_lightning._errors import HawqError
from hawq_lightning._extra import require
from hawq_lightning._types import Batch, JsonObject
from hawq_lightning.export.onnx._session import session
from hawq_lightning.export.onnx.integer import Graph
from hawq_lightning.export.onnx.integer_only._export import IntegerOnly
from hawq_lightning.export.onnx.integer_only._steps import Move

_ROWS = 50  # images at a time
_THROUGH = ("Relu", "Clip", "QuantizeLinear")  # between a layer and its codes


@dataclass(frozen=True)
class LayerDifference:
    """Codes that a layer, sum or pool gives.

    Attributes:
        codes: compared.
        differ: of the whole run.
        one_step: that differ where both start from onnxruntime's codes.
        largest: difference of two codes, of the whole run.
    """

    codes: int
    differ: int
    one_step: int
    largest: int


@dataclass(frozen=True)
class KernelDifferences:
    """A program of integers beside onnxruntime's integer kernels.

    Attributes:
        images: compared.
        same: images with the same top-1 class.
        layers: name -> its codes, in the order in which they are computed.
    """

    images: int
    same: int
    layers: Mapping[str, LayerDifference]

    def to_dict(self) -> JsonObject:
        """Plain JSON types."""
        return {"images": self.images, "same_top1": self.same, "layers": {k: vars(v) for k, v in self.layers.items()}}

    def __str__(self) -> str:
        rows = self.layers.values()
        codes, differ, one = (sum(getattr(r, k) for r in rows) for k in ("codes", "differ", "one_step"))
        return (
            f"onnxruntime's integer kernels give the same class on {self.same} of {self.images} images; {differ:,} of "
            f"{codes:,} codes differ, {one:,} where each layer starts from the same codes"
        )


def kernel_differences(
    made: IntegerOnly, batches: Iterable[Batch], images: int | None = None, *, codes: bool = True
) -> KernelDifferences:
    """Run the program in numpy and the file for integer kernels in onnxruntime, on the same images.

    Args:
        made: by :func:`to_integer_only`, of a network with one input whose first output is class logits.
        batches: tensors, or batches with the images first.
        images: stop after so many.
        codes: also compare the codes of every layer, which takes twice the time.

    Raises:
        HawqError: there are no images, the network has several inputs, or onnxruntime cannot run it.
    """
    network = made.network
    if len({port.of for port in network.inputs}) != 1:
        raise HawqError("Codes are compared for networks with one input.")
    names = _layers(made) if codes else {}
    run, takes = _session(made, list(names)), network.inputs[0].of
    logits = network.outputs[0]
    count, same = 0, 0
    found = {name: np.zeros(4, np.int64) for name in names}
    for batch in image_tensors(batches, images):
        for part in batch.split(_ROWS):
            x = part.detach().cpu().float().numpy()
            outputs, *theirs = run.run(None, {takes: x})
            given = network.codes({takes: x})
            ours = network.run(given, [*names, logits.name])
            count += len(x)
            same += int((logits.values(ours[logits.name]).argmax(1) == outputs.argmax(1)).sum())
            kept = dict(zip(names, theirs))
            alone = network.run(given, list(names), instead=kept) if names else {}
            for name, other in kept.items():
                apart = np.abs(ours[name].astype(np.int32) - other)
                step = int((alone[name] != other).sum())
                most = max(int(found[name][3]), int(apart.max(initial=0)))
                found[name] = np.asarray([found[name][0] + apart.size, found[name][1] + (apart > 0).sum(),
                                          found[name][2] + step, most])  # fmt: skip
    if not count:
        raise HawqError("There are no images to compare on.")
    rows = {label: LayerDifference(*map(int, found[name])) for name, label in names.items()}
    return KernelDifferences(count, same, rows)


def _session(made: IntegerOnly, names: list[str]) -> Any:
    onnx = require("onnx")
    proto = onnx.ModelProto.FromString(made.kernels)
    del proto.graph.output[1:]
    for name in names:
        proto.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.UINT8, None))
    return session(proto.SerializeToString())


def _layers(made: IntegerOnly) -> dict[str, str]:
    """Tensor of codes that both compute -> name of what gives it."""
    graph = Graph(require("onnx").ModelProto.FromString(made.kernels))
    makers = graph.makers()
    found: dict[str, str] = {}
    for step in made.network.steps:
        if step.result not in makers or (isinstance(step, Move) and step.op != "Concat"):
            continue
        node = makers[step.result]
        if node.op_type not in _THROUGH:
            continue
        while node.op_type in _THROUGH:
            node = makers[node.input[0]]
        weight = makers.get(node.input[1]) if len(node.input) > 1 else None
        stored = weight is not None and weight.op_type == "DequantizeLinear" and graph.is_constant(weight.input[0])
        label = f"{node.op_type} {node.name}"
        if weight is not None and stored:
            label = weight.input[0].split("//")[0].removesuffix(".codes").removesuffix(".weight_quantizer")
        found[step.result] = label if label not in found.values() else f"{label} ({step.result})"
    return found
