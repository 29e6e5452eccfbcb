"""Measured, not predicted: size, latency, throughput and memory of ONNX files, and milliseconds of every layer."""

from __future__ import annotations

import gzip
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from hawq_lightning._csv import csv_text
from hawq_lightning._errors import HawqError
from hawq_lightning._extra import require
from hawq_lightning._float_rest import plain
from hawq_lightning._io import write_text
from hawq_lightning._plan import Plan
from hawq_lightning.export.onnx._openvino import refuse_two_bits
from hawq_lightning.export.onnx._proto import content
from hawq_lightning.export.onnx._session import check_runtime, integer_kernels, open_session
from hawq_lightning.export.onnx.integer import LAYERS
from hawq_lightning.layers import as_reader, find_kind, kind_of

_PROCESS = Path(__file__).with_name("_speed_process.py")
_FIELDS = ("layer", "weight_bits", "activation_bits", "ms")
_LEAST_RUNS, _LEAST_SECONDS = 7, 0.02


@dataclass(frozen=True)
class Speed:
    """What one file takes on this machine.

    Attributes:
        file_bytes: size of the file.
        gzip_bytes: size after gzip.
        ms: median milliseconds of one image; a share of those that the file takes at a time, where that is fixed.
        images_per_second: of a whole batch.
        peak_bytes: memory beyond what Python and onnxruntime take without a network.
    """

    file_bytes: int
    gzip_bytes: int
    ms: float
    images_per_second: float
    peak_bytes: int


def measure_file(
    path: str | Path,
    shape: Sequence[int],
    *,
    threads: int = 1,
    batch: int = 32,
    seconds: float = 1.0,
    runtime: str = "onnxruntime",
) -> Speed:
    """Run a file (CPU, default optimizations, an exact file in float kernels) in a fresh process.

    Args:
        path: of an ONNX file with one float input.
        shape: of one image.
        threads: that onnxruntime may use.
        batch: images a run for the throughput, of a file that takes any number.
        seconds: of measuring, for latency and throughput each.
        runtime: ``"onnxruntime"`` or ``"openvino"``.

    Raises:
        HawqError: the extra is missing, or the runtime cannot run the file.
    """
    check_runtime(runtime)
    if runtime == "openvino":
        refuse_two_bits(path)
    kernels = int(integer_kernels(path))
    command = [sys.executable, _PROCESS, path, json.dumps(list(shape)), threads, batch, seconds, kernels, runtime]
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["it ended without a word"]
        raise HawqError(f"{runtime} cannot run {path}: {lines[-1]}")
    raw = content(Path(path))
    return Speed(len(raw), len(gzip.compress(raw, 6)), **json.loads(done.stdout.splitlines()[-1]))


def layer_latencies(
    model: nn.Module,
    plan: Plan,
    inputs: tuple[torch.Tensor, ...],
    *,
    weight_bits: Iterable[int] = (),
    threads: int = 1,
    runtime: str = "onnxruntime",
) -> list[dict[str, Any]]:
    """Milliseconds of every layer of a plan alone, for every width, one image at a time, on this machine.

    Layers are measured between codes, as integer kernels run them in an integer file: there all widths of weights take
    the same time, and what costs time is a layer that reads no grid or has no such kernel.

    Args:
        model: float or with fake-quant layers; only the layers' shapes matter.
        plan: its widths are measured, and all that it weighed.
        inputs: of the model, any number of images.
        weight_bits: more widths.
        threads: that the runtime may use.
        runtime: ``"onnxruntime"`` or ``"openvino"``; for the second all weights are INT8.

    Returns:
        rows for :class:`hawq_lightning.selection.LatencyTable`.

    Raises:
        HawqError: the extra is missing.
    """
    layers = {
        plain(n): m for n, m in model.named_modules() if (kind := find_kind(m)) is not None and kind.onnx_op is not None
    }
    check_runtime(runtime)
    shapes = _input_shapes(layers, model, inputs)
    reads = {name: s for s in plan.activations for name in s.layers}
    measured: dict[Any, float] = {}
    rows: list[dict[str, Any]] = []
    for site in plan.weights:
        widths = sorted({site.bits, *weight_bits, *(o.bits for o in site.options)})
        for name in site.layers:
            if name not in shapes:
                continue
            read = reads.get(name)
            grids: Sequence[int | None] = sorted({read.bits, *(o.bits for o in read.options)}) if read else [None]
            for bits in widths:
                for grid in grids:
                    layer = layers[name]
                    attributes = tuple(kind_of(layer).onnx_attributes(layer).items())
                    key = (kind_of(layer).onnx_op, attributes, tuple(site.shape), shapes[name], bits, grid)
                    if key not in measured:
                        case = (tuple(site.shape), shapes[name], bits, grid)
                        measured[key] = _milliseconds(layer, *case, threads, runtime)
                    rows.append(dict(zip(_FIELDS, (name, bits, grid, round(measured[key], 6)))))
    return rows


def vector_instructions() -> bool:
    """Whether this CPU sums products of 8-bit integers without saturating: x86 with VNNI, or anything else."""
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return True
    return "avx2" not in flags or "vnni" in flags


def write_table(rows: Sequence[Mapping[str, Any]], path: str | Path) -> None:
    """Write a latency table as CSV, atomically.

    Raises:
        HawqError: it cannot be written there.
    """
    write_text(path, csv_text(_FIELDS, ([row.get(c) for c in _FIELDS] for row in rows)))


def _input_shapes(
    layers: Mapping[str, nn.Module], model: nn.Module, inputs: tuple[torch.Tensor, ...]
) -> dict[str, tuple[int, ...]]:
    """Shape of one image's input of every layer, its first call's."""
    shapes_read: dict[str, tuple[int, ...]] = {}

    def hook(name: str) -> Callable[..., None]:
        def record(module: nn.Module, args: Any, kwargs: Any) -> None:
            x = kind_of(module).input(args, kwargs)
            shapes_read.setdefault(name, tuple(x.shape[1:]) if x.ndim > 1 else tuple(x.shape))

        return record

    handles = [m.register_forward_pre_hook(hook(n), with_kwargs=True) for n, m in layers.items()]
    mode = model.training
    try:
        with torch.no_grad():
            model.eval()(*inputs)
    finally:
        model.train(mode)
        for handle in handles:
            handle.remove()
    return shapes_read


def _milliseconds(
    layer: nn.Module,
    shape: tuple[int, ...],
    reads: tuple[int, ...],
    bits: int,
    grid: int | None,
    threads: int,
    runtime: str,
) -> float:
    """One layer with random codes, as integer kernels run it: from codes to codes.

    Without a grid, or where there is no such kernel, from floats to floats with weights that are float.
    """
    onnx = require("onnx")
    helper, arrays = onnx.helper, onnx.numpy_helper
    rng = np.random.default_rng(0)
    half = 1 << (bits - 1)
    codes = np.asarray(rng.integers(-half, half, shape) if bits > 1 else 2 * rng.integers(0, 2, shape) - 1, np.int8)
    kind = kind_of(layer)
    axis, size = as_reader(layer).channel_axis, kind.onnx_input_shape(reads)
    fused = grid is not None and kind.onnx_op in LAYERS
    values = {
        "codes": codes,
        "scale": np.full(shape[axis], 0.01, np.float32),
        "none": np.zeros(shape[axis], np.int8),
        "step": np.float32(4 / 2 ** (grid or 0)),
        "zero": np.uint8(0),
        "top": np.uint8((1 << (grid or 8)) - 1),
        "weight": codes.astype(np.float32) * np.float32(0.01),
    }
    make, attributes = helper.make_node, kind.onnx_attributes(layer)
    if fused:
        narrow = grid is not None and grid < 8
        nodes = [make("Clip", ["x", "zero", "top"], ["clipped"])] if narrow else []
        nodes += [
            make("DequantizeLinear", ["clipped" if narrow else "x", "step", "zero"], ["read"]),
            make("DequantizeLinear", ["codes", "scale", "none"], ["weights"], axis=axis),
            make(kind.onnx_op, ["read", "weights"], ["result"], **attributes),
            make("QuantizeLinear", ["result", "step", "zero"], ["y"]),
        ]
    else:
        nodes = [make(kind.onnx_op, ["x", "weight"], ["y"], **attributes)]
    read = {name for node in nodes for name in node.input}
    element = onnx.TensorProto.UINT8 if fused else onnx.TensorProto.FLOAT
    graph = helper.make_graph(
        nodes,
        "layer",
        [helper.make_tensor_value_info("x", element, size)],
        [helper.make_tensor_value_info("y", element, None)],
        [arrays.from_array(np.asarray(a), n) for n, a in values.items() if n in read],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    run = open_session(runtime, proto.SerializeToString(), threads)
    floats = rng.standard_normal(size, dtype=np.float32)
    feed = {"x": rng.integers(0, 1 << (grid or 8), size).astype(np.uint8) if fused else floats}
    run.run(None, feed)
    times: list[float] = []
    start = time.perf_counter()
    while len(times) < _LEAST_RUNS or time.perf_counter() - start < _LEAST_SECONDS:
        begin = time.perf_counter()
        run.run(None, feed)
        times.append(1000 * (time.perf_counter() - begin))
    return statistics.median(times)
