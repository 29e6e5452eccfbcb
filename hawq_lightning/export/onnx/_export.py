"""ONNX with real low-bit weights.

Weights are integer codes in front of a per-channel DequantizeLinear: packed bytes that a table unpacks when the file is
loaded, INT8, or INT2 and INT4 (see ``_storage``). Activations pass QuantizeLinear, a Clip where their grid is narrower
than UINT8, and DequantizeLinear. Only standard operators are used. INT2 needs opset 25, everything else opset 21.
"""

from __future__ import annotations

import io
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hawq_lightning._errors import HawqError
from hawq_lightning._extra import require
from hawq_lightning._io import write_bytes
from hawq_lightning._plan import Plan
from hawq_lightning.export._deployed import Deployed, Inputs, at_least_two, checked, deploy, first_line, portable
from hawq_lightning.export._files import check_writable
from hawq_lightning.export.onnx._proto import describe, too_large, write
from hawq_lightning.export.onnx._reductions import part_reductions
from hawq_lightning.export.onnx._session import EXACT, INTEGER, ROUNDED
from hawq_lightning.export.onnx._seven_bits import at_most_seven_bits
from hawq_lightning.export.onnx._storage import Storage, check_storage, store_weights
from hawq_lightning.export.onnx._translate import exporters_quiet, free_axes, hint, tell_fixed_axis, translated
from hawq_lightning.export.onnx.integer import float_weights, still_float, to_integers
from hawq_lightning.layers import deep_copy


def to_onnx(
    model: nn.Module,
    plan: Plan | None,
    example_input: Inputs,
    path: str | Path,
    *,
    fold: bool = True,
    exact: bool = True,
    integer: bool = False,
    storage: Storage = "lookup",
    calibration: Iterable[Inputs] | None = None,
    free_batch: bool = True,
    free_size: bool = False,
    seven_bits: bool = False,
) -> Deployed:
    """Write a quantized model as an ONNX file; the model stays as it is.

    Args:
        model: with quantizers enabled.
        plan: the plan that it carries; ``None`` reads it from the quantizers.
        example_input: float images ``[N, C, H, W]``, or a tuple of the model's positional inputs.
        path: of the file; missing folders are made, an old file is replaced atomically.
        fold: fold BatchNorm into scales and biases.
        exact: add biases by nodes of their own, so that onnxruntime leaves them float. Without it some layers run in
            integer kernels, with biases rounded to INT32: faster, but every image's activations move.
        integer: rewrite the graph so that onnxruntime (and OpenVINO) compute in integer kernels: biases are INT32, and
            tensors at sums and pools get grids of 8 bits that the plan lacks. Two to three times faster than float on
            CPUs with VNNI; a few classes in a thousand differ. ``exact`` says nothing then.
        storage: of the weights' codes: ``"lookup"``, packed bytes that every runtime unpacks when it loads;
            ``"int8"``, a byte a code; ``"native"``, INT2 and INT4, for onnxruntime 1.28 or later. The outputs are the
            same. An integer file cannot have ``"native"``.
        calibration: inputs of the model, for the ranges of an integer file's additional grids; ``None``: the example
            input. Some hundred images do.
        free_batch: let the first axis of every input be of any size, the same for all; else the file takes inputs of
            the example's shapes alone, as of graphs.
        free_size: let the axes behind the channels, height and width, be of any size that the network takes.
        seven_bits: of an integer file, hold 8-bit weights by 7 bits, each code rounded to an even one: on x86 with AVX2
            and without VNNI sums of 8-bit products saturate in onnxruntime's kernels, and with 7 bits they cannot.

    Returns:
        the deployed network that the file holds, what became of every BatchNorm, and what of an integer file stays
        float.

    Raises:
        HawqError: the model is float, was never enabled or carries another plan; an operation that cannot be exported;
            the extra ``export`` is missing; or the path cannot be written. Nothing is left half-written.
    """
    require("onnx")
    require("onnxscript")
    check_storage(storage, integer)
    if seven_bits and not integer:
        raise HawqError("seven_bits=True is for integer kernels, which sum products: give integer=True too.")
    check_writable(Path(path))
    deployed = deploy(model, plan, example_input, fold=fold, free_batch=free_batch)
    proto = translated(deployed.model, deployed.inputs, free_batch, free_size)
    if free_batch:
        tell_fixed_axis(proto, path)
    if seven_bits:
        deployed = replace(deployed, narrowed=at_most_seven_bits(proto))
    if integer:
        given = () if calibration is None else map(at_least_two if free_batch else checked, calibration)
        batches = (deployed.inputs,) if calibration is None else given
        deployed = _integers(proto, deployed, batches, storage)
    else:
        store_weights(proto, storage, exact=exact)
    part_reductions(proto)
    describe(proto, deployed, INTEGER if integer else EXACT if exact else ROUNDED)
    write(proto, Path(path))
    return deployed


def _integers(
    proto: Any, deployed: Deployed, batches: Iterable[tuple[torch.Tensor, ...]], storage: Storage
) -> Deployed:
    if too_large(proto):
        raise HawqError(
            "An integer file's weights take less than 2 GiB, since its grids are calibrated on it as a whole."
        )
    rewritten = to_integers(proto, batches)
    store_weights(proto, storage, exact=False)
    float_weights(proto, set(rewritten.codes))
    return replace(deployed, grids=rewritten.grids, still_float=still_float(proto))


def float_onnx(model: nn.Module, example_input: Inputs, path: str | Path, *, free_batch: bool = True) -> None:
    """Write a float model as an ONNX file: what the quantized one is compared with.

    Args:
        model: float; it stays as it is.
        example_input: as for :func:`to_onnx`.
        path: of the file.
        free_batch: as for :func:`to_onnx`.

    Raises:
        HawqError: as for :func:`to_onnx`.
    """
    require("onnx")
    require("onnxscript")
    check_writable(Path(path))
    copied = deep_copy(model).to("cpu").float().eval().requires_grad_(False)
    inputs = at_least_two(example_input) if free_batch else checked(example_input)
    proto = translated(copied, inputs, free_batch)
    write(proto, Path(path))


def to_program(
    model: nn.Module,
    plan: Plan | None,
    example_input: Inputs,
    path: str | Path | None = None,
    *,
    fold: bool = True,
    free_batch: bool = True,
) -> torch.export.ExportedProgram:
    """The deployed network as a ``torch.export`` program of torch's own operators, with integer weights.

    Args:
        model: with quantizers enabled; it stays as it is.
        plan: the plan that it carries; ``None`` reads it from the quantizers.
        example_input: as for :func:`to_onnx`.
        path: of a ``.pt2`` file to write, for ``torch.export.load``.
        fold: fold BatchNorm into scales and biases.
        free_batch: as for :func:`to_onnx`.

    Raises:
        HawqError: as for :func:`to_onnx`, but no extra is needed.
    """
    if path is not None:
        check_writable(Path(path))
    deployed = deploy(model, plan, example_input, fold=fold, free_batch=free_batch)
    shapes = free_axes(deployed.model, deployed.inputs, free_batch)
    try:
        with exporters_quiet():
            program = torch.export.export(
                portable(deployed.model), deployed.inputs, dynamic_shapes=shapes, strict=False
            )
        for node in program.graph.nodes:  # source lines and paths of this machine, and most of the file
            for key in ("stack_trace", "nn_module_stack", "source_fn_stack", "from_node", "torch_fn"):
                node.meta.pop(key, None)
    except Exception as error:
        advice = hint(str(error)) if free_batch else ""
        raise HawqError(f"torch.export cannot follow this model: {first_line(error)}{advice}") from error
    if path is not None:
        program.example_inputs = None  # somebody's images are not to travel along
        buffer = io.BytesIO()
        torch.export.save(program, buffer)
        write_bytes(Path(path), buffer.getvalue())
    return program
