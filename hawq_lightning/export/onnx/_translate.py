"""A deployed model as an ONNX graph, by torch's exporter."""

from __future__ import annotations

import contextlib
import inspect
import logging
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hawq_lightning._errors import HawqError
from hawq_lightning._extra import require
from hawq_lightning.export import _operators  # noqa: F401  registers the operators
from hawq_lightning.export._deployed import first_line
from hawq_lightning.export.onnx._clamps import clamps_as_clip
from hawq_lightning.export.onnx._proto import strip

OPSET = 21
_UINT8_TOP = 255


def translated(
    model: nn.Module, inputs: tuple[torch.Tensor, ...], free_batch: bool = True, free_size: bool = False
) -> Any:
    """The ONNX graph of a deployed model as it comes from the exporter, without what it tells of this machine.

    Args:
        model: deployed: every weight behind ``dequantize``, every grid a ``snap``.
        inputs: example inputs.
        free_batch: the first axis of every input may have any size.
        free_size: so may the axes behind the channels.

    Raises:
        HawqError: an operation cannot be exported, or a size cannot be free.
    """
    names = ["input"] if len(inputs) == 1 else [f"input_{i}" for i in range(len(inputs))]
    with torch.no_grad():
        result = model(*inputs)
    if free_size:
        _check_sizes(model, inputs)

    def export(least: int | None = None) -> Any:
        return torch.onnx.export(
            model,
            inputs,
            dynamo=True,
            verbose=False,
            opset_version=OPSET,
            input_names=names,
            output_names=_output_names(result),
            dynamic_shapes=free_axes(model, inputs, free_batch, free_size, least),
            custom_translation_table=_translations(),
        )

    try:
        with exporters_quiet():
            try:
                program = export()
            except Exception as error:
                if not (free_batch and _asks_for_two(error)):
                    raise
                program = export(least=2)
        assert program is not None
        proto = program.model_proto
    except Exception as error:
        raise HawqError(_why(error, free_batch)) from error
    strip(proto)
    clamps_as_clip(proto)
    fixed = [d.dim_value for x in proto.graph.input for d in x.type.tensor_type.shape.dim[2:] if not d.dim_param]
    if free_size and fixed:
        raise HawqError(
            f"The network fixes the size {fixed[0]} of its input; it cannot be exported with free_size=True."
        )
    return proto


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


def free_axes(
    model: nn.Module,
    inputs: tuple[torch.Tensor, ...],
    batch: bool = True,
    size: bool = False,
    least: int | None = None,
) -> tuple[Any, ...] | None:
    """The first axis of every input, and those behind the channels, as ``torch.export`` is told that they are free.

    Inputs that ``*args`` takes (wrappers have that) are one argument.

    Args:
        model: to be exported.
        inputs: of it.
        batch: free the first axis, one for all.
        size: free the axes from the third on, each by itself.
        least: samples in a batch, where the exporter has to be told.
    """
    if not (batch or size):
        return None
    first = {0: torch.export.Dim("batch", min=least)} if batch else {}
    # AUTO, since some networks take multiples of a number only
    each = [{**first, **(dict.fromkeys(range(2, x.ndim), torch.export.Dim.AUTO) if size else {})} for x in inputs]
    kinds = [p.kind for p in inspect.signature(model.forward).parameters.values()]
    if inspect.Parameter.VAR_POSITIONAL not in kinds:
        return tuple(each)
    named = min(kinds.index(inspect.Parameter.VAR_POSITIONAL), len(each))
    return (*each[:named], tuple(each[named:]))


def _check_sizes(model: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
    """Twice the size in every direction: the exporter itself believes a layer whose width follows from the size."""
    larger = tuple(x.repeat(1, 1, *[2] * (x.ndim - 2)) if x.ndim > 2 else x for x in inputs)
    try:
        with torch.no_grad():
            model(*larger)
    except Exception as error:
        shapes = " and ".join(str(list(x.shape[2:])) for x in inputs if x.ndim > 2)
        raise HawqError(
            f"The network takes inputs of the size {shapes} alone, not twice as large ones ({first_line(error)}); "
            "free_size=True is for networks that take any."
        ) from error


def fixed_axis(proto: Any) -> int | None:
    """Length of the first axis of an input that the exporter found no way to leave free; ``None``: all are free."""
    first = (i.type.tensor_type.shape.dim[0] for i in proto.graph.input)
    return next((int(axis.dim_value) for axis in first if axis.HasField("dim_value")), None)


def tell_fixed_axis(proto: Any, path: str | Path) -> bool:
    """Warn, for the caller of the caller, where a file takes one number of samples; whether it does."""
    size = fixed_axis(proto)
    if size is not None:
        warnings.warn(
            f"{path} takes {size} samples at a time and no other number, as the network computes with it: x.shape[0] "
            "leaves it free, len(x) and numbers in the code do not. If that is meant, give free_batch=False.",
            stacklevel=3,
        )
    return size is not None


def _output_names(result: Any) -> list[str]:
    if isinstance(result, torch.Tensor):
        return ["output"]
    if isinstance(result, dict):
        return [str(k) for k in result]
    return [f"output_{i}" for i in range(len(torch.utils._pytree.tree_leaves(result)))]


def hint(text: str) -> str:
    """What to do where the model's inputs have no batch axis in common, or it computes with the batch's size."""
    if not re.search(r"is not equal to|Constraints violated|[Ss]pecializ|batch", text):
        return ""
    return " If the first axis of its inputs is no batch of any size, give free_batch=False."


def _asks_for_two(error: BaseException) -> bool:
    """Whether torch.export says that a batch may not have one sample: 2.9 does, of shapes that it compares with 1."""
    return bool(re.search(r"Constraints violated.*\n.*generated guard \S+ != 1\.", str(error)))


def _why(error: BaseException, free_batch: bool = False) -> str:
    """One sentence from the exporter's pages."""
    causes: list[BaseException] = [error]
    while (deeper := causes[-1].__cause__) is not None:
        causes.append(deeper)
    text = "\n".join(str(e) for e in causes)
    if operation := re.search(r"No ONNX function found for <OpOverload\(op='([^']+)'", text):
        return f"The operation {operation[1]} cannot be exported to ONNX; replace it in the model's forward pass."
    return f"The model cannot be exported to ONNX: {first_line(causes[-1])}{hint(text) if free_batch else ''}"


@contextlib.contextmanager
def exporters_quiet() -> Iterator[None]:
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
