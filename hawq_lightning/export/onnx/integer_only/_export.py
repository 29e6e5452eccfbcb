"""Integer-only inference as an exporter: the program, its ONNX certificate, and the file for integer kernels beside."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import nn

from hawq_lightning._errors import HawqError
from hawq_lightning._extra import require
from hawq_lightning._plan import Plan
from hawq_lightning.export._deployed import Deployed, Inputs, at_least_two, checked, deploy
from hawq_lightning.export._files import check_writable
from hawq_lightning.export.onnx._ports import INPUTS, OUTPUTS
from hawq_lightning.export.onnx._proto import describe, write
from hawq_lightning.export.onnx._session import INTEGER, INTEGER_ONLY
from hawq_lightning.export.onnx._storage import store_weights
from hawq_lightning.export.onnx._translate import fixed_axis, tell_fixed_axis, translated
from hawq_lightning.export.onnx.integer import Graph, float_weights, still_float, to_integers
from hawq_lightning.export.onnx.integer_only._certificate import Certificate
from hawq_lightning.export.onnx.integer_only._network import IntegerNetwork
from hawq_lightning.export.onnx.integer_only._real_nodes import read

LEAST_BITS, MOST_BITS = 8, 31


@dataclass(frozen=True)
class IntegerOnly:
    """A network without floats.

    Attributes:
        network: the program, which numpy runs.
        deployed: the network that it was made of.
        kernels: content of the ONNX file for onnxruntime's integer kernels, of the same grids.
    """

    network: IntegerNetwork
    deployed: Deployed
    kernels: bytes = field(repr=False)


def to_integer_only(
    model: nn.Module,
    plan: Plan | None,
    example_input: Inputs,
    path: str | Path,
    *,
    fold: bool = True,
    batches: Iterable[Inputs] | None = None,
    multiplier_bits: int = MOST_BITS,
    free_batch: bool = True,
) -> IntegerOnly:
    """Write a quantized network as a program of integers alone; the model stays as it is.

    Sums are INT32, and a scale over a scale is a dyadic number ``b / 2^c``. The file is a certificate of integer
    operators only, from UINT8 codes to UINT8 codes or INT32 numbers: it says to the bit what an accelerator without
    floats must give. It is not made to be fast; ``to_onnx(..., integer=True)`` is.

    Args:
        model: with quantizers enabled.
        plan: the plan that it carries; ``None`` reads it from the quantizers.
        example_input: float images ``[N, C, H, W]``, or a tuple of the model's positional inputs.
        path: of the ONNX file; missing folders are made, an old file is replaced atomically.
        fold: fold BatchNorm into scales and biases.
        batches: inputs of the model, for the ranges that the plan lacks, at sums and pools; ``None``: the example.
        multiplier_bits: of b's magnitude, 8 to 31.
        free_batch: let the first axis of every input be of any size.

    Raises:
        HawqError: as for :func:`hawq_lightning.export.to_onnx`, or an operator has no integer form. Nothing is written
            then.
    """
    if type(multiplier_bits) is not int or not LEAST_BITS <= multiplier_bits <= MOST_BITS:
        raise HawqError(f"multiplier_bits={multiplier_bits!r} must be a whole number from {LEAST_BITS} to {MOST_BITS}.")
    onnx = require("onnx")
    require("onnxscript")
    check_writable(Path(path))
    deployed = deploy(model, plan, example_input, fold=fold, free_batch=free_batch)
    proto = translated(deployed.model, deployed.inputs, free_batch)
    free = free_batch and fixed_axis(proto) is None
    seen = (deployed.inputs,) if batches is None else map(at_least_two if free else checked, batches)
    rewritten = to_integers(proto, seen)
    network = read(Graph(proto), multiplier_bits)
    if free_batch:
        tell_fixed_axis(proto, path)
    shapes = {i.name: tuple(x.shape) for i, x in zip(proto.graph.input, deployed.inputs)}
    certificate = Certificate(network, shapes, free).proto()
    kernels = onnx.ModelProto.FromString(proto.SerializeToString())
    store_weights(kernels, "int8", exact=False)
    float_weights(kernels, set(rewritten.codes))
    deployed = replace(deployed, grids=rewritten.grids, still_float=still_float(kernels))
    describe(kernels, deployed, INTEGER)
    describe(certificate, deployed, INTEGER_ONLY)
    for key, ports in ((INPUTS, network.inputs), (OUTPUTS, network.outputs)):
        entry = certificate.metadata_props.add()
        entry.key, entry.value = key, json.dumps([port.to_dict() for port in ports])
    write(certificate, Path(path))
    return IntegerOnly(network, deployed, kernels.SerializeToString())
