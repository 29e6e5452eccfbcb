"""Phones and microcontrollers: ExecuTorch's ``.pte`` and LiteRT's ``.tflite``, integers throughout."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from hawq_lightning._batches import image_tensors
from hawq_lightning._errors import HawqError
from hawq_lightning._extra import require
from hawq_lightning._io import write_bytes
from hawq_lightning._plan import Plan
from hawq_lightning._types import Batch, JsonObject
from hawq_lightning.export._deployed import Inputs, first_line
from hawq_lightning.export._files import check_writable
from hawq_lightning.export._pt2e import IntegerProgram, to_pt2e


@dataclass(frozen=True)
class MobileAgreement:
    """A file run by its runtime, image by image.

    Attributes:
        runtime: its name.
        images: run.
        same: images with the same top-1 class as the fake-quant model.
        difference: the greatest absolute difference of an output.
    """

    runtime: str
    images: int
    same: int
    difference: float

    def to_dict(self) -> JsonObject:
        """Plain JSON types."""
        return {"images": self.images, "same_top1": self.same, "largest_difference": self.difference}

    def __str__(self) -> str:
        return (
            f"{self.runtime} agrees on {self.same} of {self.images} images ({self.same / self.images:.2%}), outputs "
            f"differ by at most {self.difference:.2g}"
        )


@dataclass(frozen=True)
class MobileFile:
    """What was written.

    Attributes:
        integers: the program that was lowered.
        delegates: parts that XNNPACK runs, one if it runs all; 0 of a ``.tflite``, which has none.
        left: operations that are left to ExecuTorch's own kernels.
    """

    integers: IntegerProgram
    delegates: int = 0
    left: tuple[str, ...] = ()


def to_executorch(
    model: nn.Module,
    plan: Plan | None,
    example_input: Inputs,
    path: str | Path,
    *,
    batches: Iterable[Batch] | None = None,
) -> MobileFile:
    """Write a ``.pte`` file for one image, lowered to XNNPACK.

    Args:
        model: with quantizers enabled; it stays as it is.
        plan: the plan that it carries; ``None`` reads it from the quantizers.
        example_input: float images ``[N, C, H, W]``.
        path: of the file; missing folders are made, an old file is replaced atomically.
        batches: for the ranges that the plan lacks, at sums and pools; ``None``: the example.

    Raises:
        HawqError: the extra ``executorch`` is missing, ExecuTorch refuses the program, or as for ``to_pt2e``.
    """
    with _quiet():
        xnnpack = require("executorch.backends.xnnpack.partition.xnnpack_partitioner")
        exir = require("executorch.exir")
    check_writable(Path(path))
    integers = to_pt2e(model, plan, example_input, batches)
    with _refusals("ExecuTorch"):
        edge = exir.to_edge_transform_and_lower(integers.program, partitioner=[xnnpack.XnnpackPartitioner()])
        nodes = [str(n.target) for n in edge.exported_program().graph.nodes if n.op == "call_function"]
        content = edge.to_executorch().buffer
    write_bytes(Path(path), bytes(content))
    delegates = [n for n in nodes if "executorch_call_delegate" in n]
    return MobileFile(integers, len(delegates), tuple(n for n in nodes if n not in delegates and "getitem" not in n))


def to_litert(
    model: nn.Module,
    plan: Plan | None,
    example_input: Inputs,
    path: str | Path,
    *,
    batches: Iterable[Batch] | None = None,
) -> MobileFile:
    """Write a ``.tflite`` file for one image, int8 in and out.

    Args:
        model: with quantizers enabled; it stays as it is.
        plan: the plan that it carries; ``None`` reads it from the quantizers.
        example_input: float images ``[N, C, H, W]``.
        path: of the file; missing folders are made, an old file is replaced atomically.
        batches: for the ranges that the plan lacks, at sums and pools; ``None``: the example.

    Raises:
        HawqError: the extra ``litert`` is missing, LiteRT's converter refuses the program, or as for ``to_pt2e``.
    """
    with _quiet():
        converter = require("litert_torch")
        config = require("litert_torch.quantize.quant_config").QuantConfig
        quantizer = require("litert_torch.quantize.pt2e_quantizer")
    check_writable(Path(path))
    integers = to_pt2e(model, plan, example_input, batches, float_weights=True)
    # it quantizes nothing that is not yet: it makes the converter take static grids for the ports too
    static = quantizer.get_symmetric_quantization_config(is_per_channel=True, is_dynamic=False)
    how = config(pt2e_quantizer=quantizer.PT2EQuantizer().set_global(static))
    one = example_input if isinstance(example_input, torch.Tensor) else example_input[0]
    with _refusals("LiteRT's converter"):
        made = converter.convert(integers.program.module(), (one[:1].detach().cpu().float(),), quant_config=how)
        content = made.model_content()
    write_bytes(Path(path), bytes(content))
    return MobileFile(integers)


def compare_executorch(
    model: nn.Module, path: str | Path, batches: Iterable[Batch], images: int | None = None
) -> MobileAgreement:
    """Run a ``.pte`` file with ExecuTorch's runtime beside the quantized model.

    Args:
        model: the fake-quant model that was exported; class logits.
        path: of the file.
        batches: tensors, or batches with the images first.
        images: stop after so many.

    Raises:
        HawqError: no images, the extra is missing, or the runtime refuses the file.
    """
    with _refusals("ExecuTorch"):
        runtime = require("executorch.runtime").Runtime.get()
        program = runtime.load_program(str(path))
        method = program.load_method("forward")
    return _compare("ExecuTorch", model, lambda x: method.execute([x.contiguous()])[0].numpy().copy(), batches, images)


def compare_litert(
    model: nn.Module, path: str | Path, batches: Iterable[Batch], images: int | None = None
) -> MobileAgreement:
    """Run a ``.tflite`` file with LiteRT's interpreter beside the quantized model.

    Args:
        model: the fake-quant model that was exported; class logits.
        path: of the file.
        batches: tensors, or batches with the images first.
        images: stop after so many.

    Raises:
        HawqError: no images, the extra is missing, or the runtime refuses the file.
    """
    with _refusals("LiteRT"):
        interpreter = require("ai_edge_litert.interpreter").Interpreter(str(path), num_threads=1)
        interpreter.allocate_tensors()
    takes, gives = interpreter.get_input_details()[0], interpreter.get_output_details()[0]
    (scale, zero), (step, middle) = takes["quantization"], gives["quantization"]

    def run(x: torch.Tensor) -> np.ndarray:
        codes = np.clip(np.round(x.numpy() / scale) + zero, -128, 127).astype(np.int8)
        interpreter.set_tensor(takes["index"], codes)
        interpreter.invoke()
        outputs: np.ndarray = (interpreter.get_tensor(gives["index"]).astype(np.float32) - middle) * step
        return outputs

    return _compare("LiteRT", model, run, batches, images)


@torch.no_grad()
def _compare(
    name: str, model: nn.Module, run: Callable[[torch.Tensor], np.ndarray], batches: Iterable[Batch], images: int | None
) -> MobileAgreement:
    model = model.eval()
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    count, same, difference = 0, 0, 0.0
    for x in image_tensors(batches, images):
        expected = model(x.to(device)).float().cpu().numpy()
        actual = np.concatenate([run(image[None].cpu().float()) for image in x])
        same += int((expected.argmax(1) == actual.argmax(1)).sum())
        difference = max(difference, float(np.abs(expected - actual).max(initial=0)))
        count += len(x)
    if not count:
        raise HawqError("There are no images to compare on.")
    return MobileAgreement(name, count, same, difference)


@contextlib.contextmanager
def _refusals(name: str) -> Iterator[None]:
    try:
        with _quiet():
            yield
    except HawqError:
        raise
    except Exception as error:
        raise HawqError(f"{name} refuses this network: {first_line(error)}") from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Their progress and advice are about their own insides."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
