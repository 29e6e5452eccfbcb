"""ONNX with real low-bit weights.

Weights are integer codes in front of a per-channel DequantizeLinear: packed bytes that a table unpacks when the file is
loaded, INT8, or INT2 and INT4 (see ``_storage``). Activations pass QuantizeLinear, a Clip where their grid is narrower
than UINT8, and DequantizeLinear. Only standard operators are used. INT2 needs opset 25, everything else opset 21.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import io
import json
import logging
import re
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hawq_lightning._errors import HawqError
from hawq_lightning._extra import require
from hawq_lightning._io import write_bytes
from hawq_lightning._plan import Plan
from hawq_lightning._version import __version__
from hawq_lightning.export import _operators  # noqa: F401  registers the operators
from hawq_lightning.export._deployed import Deployed, Inputs, at_least_two, deploy, first_line, portable
from hawq_lightning.export._files import check_writable
from hawq_lightning.export.onnx._session import EXACT, FORM, INTEGER, ROUNDED
from hawq_lightning.export.onnx._storage import Storage, check_storage, store_weights
from hawq_lightning.export.onnx.integer import float_weights, still_float, to_integers

OPSET = 21
_UINT8_TOP = 255


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
    check_writable(Path(path))
    deployed = deploy(model, plan, example_input, fold=fold, free_batch=free_batch)
    proto = _translate(deployed.model, deployed.inputs, free_batch)
    _strip(proto)
    if integer:
        batches = (deployed.inputs,) if calibration is None else map(at_least_two, calibration)
        deployed = _integers(proto, deployed, batches, storage)
    else:
        store_weights(proto, storage, exact=exact)
    _describe(proto, deployed, INTEGER if integer else EXACT if exact else ROUNDED)
    _write(proto, Path(path))
    return deployed


def _integers(
    proto: Any, deployed: Deployed, batches: Iterable[tuple[torch.Tensor, ...]], storage: Storage
) -> Deployed:
    rewritten = to_integers(proto, batches)
    store_weights(proto, storage, exact=False)
    float_weights(proto, set(rewritten.codes))
    return replace(deployed, grids=rewritten.grids, still_float=still_float(proto))


def float_onnx(model: nn.Module, example_input: Inputs, path: str | Path) -> None:
    """Write a float model as an ONNX file: what the quantized one is compared with.

    Raises:
        HawqError: as for :func:`to_onnx`.
    """
    require("onnx")
    require("onnxscript")
    check_writable(Path(path))
    copied = copy.deepcopy(model).to("cpu").float().eval().requires_grad_(False)
    proto = _translate(copied, at_least_two(example_input))
    _strip(proto)
    _write(proto, Path(path))


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
    shapes = _free_batch(deployed.model, deployed.inputs) if free_batch else None
    try:
        with _quiet():
            program = torch.export.export(
                portable(deployed.model), deployed.inputs, dynamic_shapes=shapes, strict=False
            )
        for node in program.graph.nodes:  # source lines and paths of this machine, and most of the file
            for key in ("stack_trace", "nn_module_stack", "source_fn_stack", "from_node", "torch_fn"):
                node.meta.pop(key, None)
    except Exception as error:
        hint = _hint(str(error)) if free_batch else ""
        raise HawqError(f"torch.export cannot follow this model: {first_line(error)}{hint}") from error
    if path is not None:
        program.example_inputs = None  # somebody's images are not to travel along
        buffer = io.BytesIO()
        torch.export.save(program, buffer)
        write_bytes(Path(path), buffer.getvalue())
    return program


def _translate(model: nn.Module, inputs: tuple[torch.Tensor, ...], free_batch: bool = True) -> Any:
    names = ["input"] if len(inputs) == 1 else [f"input_{i}" for i in range(len(inputs))]
    with torch.no_grad():
        result = model(*inputs)
    try:
        with _quiet():
            program = torch.onnx.export(
                model,
                inputs,
                dynamo=True,
                verbose=False,
                opset_version=OPSET,
                input_names=names,
                output_names=_output_names(result),
                dynamic_shapes=_free_batch(model, inputs) if free_batch else None,
                custom_translation_table=_translations(),
            )
        assert program is not None
        return program.model_proto
    except Exception as error:
        raise HawqError(_why(error, free_batch)) from error


def _translations() -> dict[Any, Any]:
    onnx, op = require("onnx"), require("onnxscript").opset21

    def byte(value: int) -> Any:
        return op.Constant(value=onnx.helper.make_tensor("code", onnx.TensorProto.UINT8, [], [value]))

    def snap(x: Any, scale: float, zero: int, top: int) -> Any:
        step = op.Constant(value_float=scale)
        codes = op.QuantizeLinear(x, step, byte(zero))
        if top < _UINT8_TOP:
            codes = op.Clip(codes, byte(0), byte(top))
        return op.DequantizeLinear(codes, step, byte(zero))

    def dequantize(codes: Any, scale: Any, axis: int) -> Any:
        return op.DequantizeLinear(codes, scale, axis=axis)

    ours = torch.ops.hawq_lightning
    return {ours.snap.default: snap, ours.dequantize.default: dequantize}


def _free_batch(model: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[Any, ...]:
    """The first axis of every input; those that ``*args`` takes (wrappers have that) are one argument."""
    batch = torch.export.Dim("batch")
    each = [{0: batch} for _ in inputs]
    kinds = [p.kind for p in inspect.signature(model.forward).parameters.values()]
    if inspect.Parameter.VAR_POSITIONAL not in kinds:
        return tuple(each)
    named = min(kinds.index(inspect.Parameter.VAR_POSITIONAL), len(each))
    return (*each[:named], tuple(each[named:]))


def _output_names(result: Any) -> list[str]:
    if isinstance(result, torch.Tensor):
        return ["output"]
    if isinstance(result, dict):
        return [str(k) for k in result]
    return [f"output_{i}" for i in range(len(torch.utils._pytree.tree_leaves(result)))]


def _hint(text: str) -> str:
    """What to do where the model's inputs have no batch axis in common, or it computes with the batch's size."""
    if not re.search(r"is not equal to|Constraints violated|[Ss]pecializ|batch", text):
        return ""
    return " If the first axis of its inputs is no batch of any size, give free_batch=False."


def _why(error: BaseException, free_batch: bool = False) -> str:
    """One sentence from the exporter's pages."""
    causes: list[BaseException] = [error]
    while (deeper := causes[-1].__cause__) is not None:
        causes.append(deeper)
    text = "\n".join(str(e) for e in causes)
    if operation := re.search(r"No ONNX function found for <OpOverload\(op='([^']+)'", text):
        return f"The operation {operation[1]} cannot be exported to ONNX; replace it in the model's forward pass."
    return f"The model cannot be exported to ONNX: {first_line(causes[-1])}{_hint(text) if free_batch else ''}"


def _describe(proto: Any, deployed: Deployed, form: str) -> None:
    proto.producer_name, proto.producer_version = "hawq_lightning", __version__
    plan = deployed.plan
    about = {
        FORM: form,
        "hawq_lightning.bits": plan.bits,
        "hawq_lightning.code": {s.name: s.code for s in plan.weights},
        "hawq_lightning.budget": plan.budget,
        "hawq_lightning.selector": plan.selector,
        "hawq_lightning.fingerprint": plan.fingerprint,
        "hawq_lightning.folded": {k: list(v) for k, v in deployed.folding.folded.items()},
        "hawq_lightning.not_folded": dict(deployed.folding.kept),
    } | ({"hawq_lightning.still_float": dict(deployed.still_float)} if form == INTEGER else {})
    for key, value in about.items():
        entry = proto.metadata_props.add()
        entry.key, entry.value = key, value if isinstance(value, str) else json.dumps(value)


def _strip(proto: Any) -> None:
    # the exporter writes source lines, class names and paths of this machine beside every node
    del proto.metadata_props[:]
    del proto.graph.metadata_props[:]
    for part in (proto.graph.node, proto.graph.initializer, proto.graph.input, proto.graph.output):
        for item in part:
            if hasattr(item, "metadata_props"):
                del item.metadata_props[:]
            item.doc_string = ""
    del proto.graph.value_info[:]
    del proto.functions[:]
    proto.graph.name = "main"


def _write(proto: Any, path: Path) -> None:
    onnx = require("onnx")
    if proto.ByteSize() >= onnx.checker.MAXIMUM_PROTOBUF:
        raise HawqError(f"The network takes {proto.ByteSize():,} bytes; an ONNX file holds less than 2 GiB.")
    try:
        onnx.checker.check_model(proto, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise HawqError(f"onnx's checker refuses the exported model: {first_line(error)}") from error
    write_bytes(path, proto.SerializeToString())


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporters' progress and advice are about their own insides."""
    noisy = [logging.getLogger(n) for n in ("torch.onnx", "onnxscript", "onnx_ir", "torch.export", "torch.fx")]
    before = [logger.level for logger in noisy]
    for logger in noisy:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(noisy, before):
            logger.setLevel(level)
