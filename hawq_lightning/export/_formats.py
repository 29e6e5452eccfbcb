"""The exporters that come with the package."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import nn

from hawq_lightning._plan import Plan
from hawq_lightning._types import Batch
from hawq_lightning.export._deployed import Deployed, Inputs
from hawq_lightning.export._exporters import register_exporter
from hawq_lightning.export._huffman import HuffmanCheck, HuffmanSize, save_huffman, verify_huffman
from hawq_lightning.export._mobile import (
    MobileAgreement,
    MobileFile,
    compare_executorch,
    compare_litert,
    to_executorch,
    to_litert,
)
from hawq_lightning.export._packed import save_packed
from hawq_lightning.export.onnx import (
    Agreement,
    Encodings,
    IntegerOnly,
    QonnxAgreement,
    Storage,
    SymmetricFile,
    Widths,
    compare,
    compare_qonnx,
    to_aimet,
    to_integer_only,
    to_onnx,
    to_program,
    to_qonnx,
    to_tensorrt,
)


def _verify_onnx(model: nn.Module, path: Path, batches: Iterable[Batch], images: int | None) -> Agreement:
    return compare(model, path, batches, images=images)


@register_exporter("packed", suffix=".safetensors", code_formats=None, even_steps=False, needs_example=False)
def _write_packed(model: nn.Module, plan: Plan, path: Path, example_input: Inputs | None, /) -> int:
    return save_packed(model, plan, path)


def _verify_huffman(model: nn.Module, path: Path, batches: Iterable[Batch], images: int | None) -> HuffmanCheck:
    return verify_huffman(model, path)


@register_exporter(
    "huffman", suffix=".huffman.safetensors", packages=("bitarray",), code_formats=None, even_steps=False,
    needs_example=False, verify=_verify_huffman,
)  # fmt: skip
def _write_huffman(model: nn.Module, plan: Plan, path: Path, example_input: Inputs | None, /) -> HuffmanSize:
    return save_huffman(model, plan, path)


@register_exporter("onnx", suffix=".onnx", packages=("onnx", "onnxscript"), verify=_verify_onnx)
def _write_onnx(
    model: nn.Module,
    plan: Plan,
    path: Path,
    example_input: Inputs | None,
    /,
    *,
    fold: bool = True,
    exact: bool = True,
    storage: Storage = "lookup",
    free_batch: bool = True,
    free_size: bool = False,
) -> Deployed:
    assert example_input is not None
    return to_onnx(
        model, plan, example_input, path, fold=fold, exact=exact, storage=storage, free_batch=free_batch,
        free_size=free_size,
    )  # fmt: skip


@register_exporter(
    "onnx_integer", suffix=".integer.onnx", packages=("onnx", "onnxscript", "onnxruntime"), verify=_verify_onnx
)
def _write_integer_onnx(
    model: nn.Module,
    plan: Plan,
    path: Path,
    example_input: Inputs | None,
    /,
    *,
    fold: bool = True,
    storage: Storage = "lookup",
    calibration: Iterable[Inputs] | None = None,
    free_batch: bool = True,
    free_size: bool = False,
    seven_bits: bool = False,
) -> Deployed:
    assert example_input is not None
    return to_onnx(
        model, plan, example_input, path, fold=fold, integer=True, storage=storage, calibration=calibration,
        free_batch=free_batch, free_size=free_size, seven_bits=seven_bits,
    )  # fmt: skip


@register_exporter(
    "integer_only", suffix=".integer_only.onnx", packages=("onnx", "onnxscript", "onnxruntime"), verify=_verify_onnx
)
def _write_integer_only(
    model: nn.Module,
    plan: Plan,
    path: Path,
    example_input: Inputs | None,
    /,
    *,
    fold: bool = True,
    batches: Iterable[Inputs] | None = None,
    multiplier_bits: int = 31,
    free_batch: bool = True,
) -> IntegerOnly:
    assert example_input is not None
    return to_integer_only(
        model, plan, example_input, path, fold=fold, batches=batches, multiplier_bits=multiplier_bits,
        free_batch=free_batch,
    )  # fmt: skip


def _verify_outputs(model: nn.Module, path: Path, batches: Iterable[Batch], images: int | None) -> Agreement:
    return compare(model, path, batches, images=images, codes=False)


@register_exporter(
    "tensorrt",
    suffix=".tensorrt.onnx",
    packages=("onnx", "onnxscript"),
    verify=_verify_outputs,
    verify_packages=("onnxruntime",),
)
def _write_tensorrt(
    model: nn.Module,
    plan: Plan,
    path: Path,
    example_input: Inputs | None,
    /,
    *,
    fold: bool = True,
    free_batch: bool = True,
) -> SymmetricFile:
    assert example_input is not None
    return to_tensorrt(model, plan, example_input, path, fold=fold, free_batch=free_batch)


@register_exporter("program", suffix=".pt2")
def _write_program(
    model: nn.Module,
    plan: Plan,
    path: Path,
    example_input: Inputs | None,
    /,
    *,
    fold: bool = True,
    free_batch: bool = True,
) -> torch.export.ExportedProgram:
    assert example_input is not None
    return to_program(model, plan, example_input, path, fold=fold, free_batch=free_batch)


def _verify_qonnx(model: nn.Module, path: Path, batches: Iterable[Batch], images: int | None) -> QonnxAgreement:
    return compare_qonnx(model, path, batches, images=images)


@register_exporter(
    "qonnx",
    suffix=".qonnx.onnx",
    packages=("onnx", "onnxscript"),
    verify=_verify_qonnx,
    verify_packages=("qonnx",),
)
def _write_qonnx(
    model: nn.Module, plan: Plan, path: Path, example_input: Inputs | None, /, *, free_batch: bool = True
) -> Widths:
    assert example_input is not None
    return to_qonnx(model, plan, example_input, path, free_batch=free_batch)


@register_exporter(
    "aimet",
    suffix=".aimet.onnx",
    packages=("onnx", "onnxscript"),
    beside=(".encodings", ".0_6_1.encodings"),
)
def _write_aimet(
    model: nn.Module,
    plan: Plan,
    path: Path,
    example_input: Inputs | None,
    /,
    *,
    fold: bool = True,
    free_batch: bool = True,
) -> Encodings:
    assert example_input is not None
    return to_aimet(model, plan, example_input, path, fold=fold, free_batch=free_batch)


def _verify_executorch(model: nn.Module, path: Path, batches: Iterable[Batch], images: int | None) -> MobileAgreement:
    return compare_executorch(model, path, batches, images)


@register_exporter("executorch", suffix=".pte", packages=("executorch",), verify=_verify_executorch)
def _write_executorch(
    model: nn.Module, plan: Plan, path: Path, example_input: Inputs | None, /, *, batches: Iterable[Batch] | None = None
) -> MobileFile:
    assert example_input is not None
    return to_executorch(model, plan, example_input, path, batches=batches)


def _verify_litert(model: nn.Module, path: Path, batches: Iterable[Batch], images: int | None) -> MobileAgreement:
    return compare_litert(model, path, batches, images)


@register_exporter(
    "litert", suffix=".tflite", packages=("litert_torch",), verify=_verify_litert, verify_packages=("ai_edge_litert",)
)
def _write_litert(
    model: nn.Module, plan: Plan, path: Path, example_input: Inputs | None, /, *, batches: Iterable[Batch] | None = None
) -> MobileFile:
    assert example_input is not None
    return to_litert(model, plan, example_input, path, batches=batches)
