"""Size, speed and memory of float, uniform 8 bits and the plan, side by side by onnxruntime on this machine."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from hawq_lightning._extra import require
from hawq_lightning._plan import Plan, PlanSite
from hawq_lightning._types import JsonObject
from hawq_lightning.export import EXPORTERS, export
from hawq_lightning.export.onnx import float_onnx, measure_file, vector_instructions
from hawq_lightning.quantization import quantize

TASK = "net."  # what a run puts in front of every name


def speeds(
    whole: nn.Module,
    plan: Plan,
    first: torch.Tensor,
    path: Path,
    *,
    integer: Path | None = None,
    threads: int = 1,
    batch_size: int = 32,
    seconds: float = 1.0,
    how: Mapping[str, object],
    runtimes: Sequence[str] = ("onnxruntime",),
) -> JsonObject:
    """Measure the three files; ``speed`` and ``speed_settings`` of export.json, ``speed_openvino`` of OpenVINO.

    Args:
        whole: the float network; it becomes the one of uniform 8 bits.
        plan: of the run.
        first: images as the network takes them.
        path: of the plan's ONNX file.
        integer: of its file for integer kernels; ``None``: there is none.
        threads: for onnxruntime.
        batch_size: for the throughput; files that take a fixed number of images run that.
        seconds: of every measurement.
        how: options of the exporter, see :func:`hawq_lightning.export.to_onnx`.
        runtimes: that run the files.

    Raises:
        HawqError: the extra is missing, or the network cannot be exported.
    """
    measure = partial(measure_file, shape=tuple(first.shape[1:]), threads=threads, batch=batch_size, seconds=seconds)
    with tempfile.TemporaryDirectory() as folder:
        exporter, even = EXPORTERS["onnx"], uniform(inner(plan, whole), 8)
        unquantized, eight = (Path(folder) / f"{name}{exporter.suffix}" for name in ("float", "uniform"))
        float_onnx(whole, first, unquantized, free_batch=bool(how.get("free_batch", True)))
        export(quantize(whole, even), even, eight, exporter.name, example_input=first, **how)
        files = {"float": unquantized, "uniform 8": eight, "plan": path}
        if integer is not None:
            files["integer"] = integer
        measured = {r: {k: asdict(measure(file, runtime=r)) for k, file in files.items()} for r in runtimes}
    versions = {runtime: require(runtime).__version__.split("-")[0] for runtime in runtimes}
    named = {("speed" if r == "onnxruntime" else f"speed_{r}"): rows for r, rows in measured.items()}
    return named | {"speed_settings": {**versions, "threads": threads, "batch_size": batch_size}}


def uniform(plan: Plan, bits: int) -> Plan:
    """The same sites at one width, activations over the same ranges."""
    return plan.replace(sites=tuple(_at(s, bits) for s in plan.sites), selector="uniform", costs={}, budget=None)


def _at(site: PlanSite, bits: int) -> PlanSite:
    if site.kind == "weight" or site.scale is None or site.zero_point is None:
        return replace(site, bits=bits, code="affine")
    ratio = ((1 << bits) - 1) / ((1 << site.bits) - 1)
    return replace(site, bits=bits, scale=site.scale / ratio, zero_point=round(site.zero_point * ratio))


def inner(plan: Plan, net: nn.Module) -> Plan:
    """The plan with the names of the network alone; runs name it ``net`` inside their task."""
    names = {n for n, _ in net.named_modules()}
    if all(
        layer.rpartition(":")[0] in names if ":" in layer else layer in names for s in plan.sites for layer in s.layers
    ):
        return plan
    root = TASK.rstrip(".")

    def own(name: str) -> str:
        return name.removeprefix(root) if name.startswith(f"{root}:") else name.removeprefix(TASK)

    sites = tuple(replace(s, name=own(s.name), layers=tuple(map(own, s.layers))) for s in plan.sites)
    return plan.replace(sites=sites, layers=(), biases={own(n): own(norm) for n, norm in plan.biases.items()})


def show(record: JsonObject, note: str = "") -> None:
    """Print the table of sizes and speeds, and what the files take of the float network's time."""
    for runtime, key in (("onnxruntime", "speed"), ("openvino", "speed_openvino")):
        if key in record:
            _show(record[key], runtime, record["speed_settings"])
    rows = record["speed"]
    names = {"plan": "model.onnx", "integer": "model.integer.onnx"}
    times = [f"{names[k]} {rows['float']['ms'] / rows[k]['ms']:.2f}x" for k in names if k in rows]
    print(f"Speed of one image, over the float network's: {', '.join(times)}.")
    if not vector_instructions():
        print(
            "This CPU has no VNNI: sums of 8-bit products may saturate in its integer kernels, which codes of 7 bits "
            "or fewer cannot; compare the classes, or write model.integer.onnx with seven_bits=true."
        )
    if note:
        print(note)


def _show(rows: JsonObject, runtime: str, how: JsonObject) -> None:
    table = Table(title=f"{runtime} {how[runtime]} on this machine's CPU, threads={how['threads']}")
    for heading in ("", "file", "gzip", "1 image", f"images/s in {how['batch_size']}s", "memory"):
        table.add_column(heading, justify="left" if not heading else "right")
    for name, s in rows.items():
        table.add_row(
            name,
            f"{s['file_bytes'] / 1024:,.1f} KiB",
            f"{s['gzip_bytes'] / 1024:,.1f} KiB",
            f"{s['ms']:.3f} ms",
            f"{s['images_per_second']:,.0f}",
            f"{s['peak_bytes'] / 2**20:,.1f} MiB",
        )
    Console().print(table)
