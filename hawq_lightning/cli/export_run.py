"""What ``hawq-lightning-export`` does with a run folder."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table
from torch import nn

from hawq_lightning.cli.onnx import Images, write_onnx
from hawq_lightning.cli.parts import make_data
from hawq_lightning.errors import HawqError
from hawq_lightning.export import load_packed, network_of, to_onnx, to_program
from hawq_lightning.export.extra import require
from hawq_lightning.export.onnx_file import float_onnx
from hawq_lightning.export.speed import Speed, layer_latencies, measure_file, write_table
from hawq_lightning.plan import Plan, PlanSite, write_text
from hawq_lightning.quantization import quantize, uninstall

_TASK = "net."  # what a run puts in front of every name
_NO_DOWNLOAD = {"weights": None, "pretrained": False, "pretrained_backbone": False}


def export_run(cfg: DictConfig) -> dict[str, Any]:
    """Write ``model.onnx``, ``model.pt2``, ``latency.csv`` and ``export.json`` into a run folder; print what they take.

    Returns:
        What export.json holds.

    Raises:
        HawqError: no run there, the extra ``export`` is missing, or the network cannot be exported.
    """
    require("onnx"), require("onnxscript"), require("onnxruntime")
    folder = Path(cfg.run_folder)
    run = _settings(folder, cfg.data_root)
    plan = Plan.load(folder / "plan.json")
    net = load_packed(folder / "model.safetensors", _fresh(run)).eval()
    batches = _batches(run)
    first = Images(net, batches).first()
    record = write_onnx(folder, net, plan, batches, cfg.images, fold=cfg.fold, exact=cfg.exact)
    if cfg.program:
        to_program(network_of(net), plan, first, folder / "model.pt2", fold=cfg.fold)
    if cfg.speed:
        whole, note = _float_network(run, folder)
        record["speed"] = {
            k: asdict(v) for k, v in _speeds(cfg, network_of(whole), plan, first, folder / "model.onnx").items()
        }
        show(record["speed"], note, cfg)
    if cfg.table:
        inner = _inner(plan, net)
        rows = layer_latencies(network_of(net), inner, (first[:1],), threads=cfg.threads)
        if inner is not plan:  # the run reads the table under its own names
            rows = [{**row, "layer": f"{_TASK}{row['layer']}"} for row in rows]
        write_table(rows, folder / "latency.csv")
    write_text(folder / "export.json", json.dumps(record, indent=1))
    print(f"written: {', '.join(sorted(p.name for p in folder.glob('model.*')))}")
    return record


def _settings(folder: Path, data_root: str | None) -> DictConfig:
    path = folder / ".hydra" / "config.yaml"
    if not path.is_file():
        raise HawqError(f"There is no run at {folder}: {path} is missing.")
    run = OmegaConf.load(path)
    assert isinstance(run, DictConfig)
    OmegaConf.set_struct(run, False)
    run.paths.output_dir = str(folder)
    for key in _NO_DOWNLOAD:
        if key in run.model:
            run.model[key] = _NO_DOWNLOAD[key]
    if data_root is not None:
        run.data.root = data_root
    return run


def _fresh(run: DictConfig) -> nn.Module:
    return instantiate(run.model, _convert_="all")


def _batches(run: DictConfig) -> Iterable[Any]:
    data = make_data(run)
    data.prepare_data()
    data.setup("validate")
    return data.val_dataloader()


def _float_network(run: DictConfig, folder: Path) -> tuple[nn.Module, str]:
    """The network with full-precision weights if the run kept a checkpoint, else with the quantized ones."""
    path = folder / "checkpoints" / "fine_tuning" / "last.ckpt"
    if path.is_file():
        state = torch.load(path, map_location="cpu", weights_only=False)["state_dict"]
        net = _fresh(run)
        own = net.state_dict()
        given = {k.removeprefix(_TASK): v for k, v in state.items()}
        if set(own) <= set(given):
            net.load_state_dict({k: given[k] for k in own})
            return net.eval(), ""
    net = load_packed(folder / "model.safetensors", _fresh(run))
    note = "float and uniform 8 hold the quantized weights (no checkpoint in the folder): compare their gzip with care"
    return uninstall(net).eval(), note


def _speeds(cfg: DictConfig, whole: nn.Module, plan: Plan, first: torch.Tensor, path: Path) -> dict[str, Speed]:
    how = {"threads": cfg.threads, "batch": cfg.batch_size, "seconds": cfg.seconds}
    shape = tuple(first.shape[1:])
    with tempfile.TemporaryDirectory() as folder:
        float_onnx(whole, first, Path(folder) / "float.onnx")
        even = uniform(_inner(plan, whole), 8)
        to_onnx(quantize(whole, even), even, first, Path(folder) / "uniform.onnx", fold=cfg.fold, exact=cfg.exact)
        return {
            "float": measure_file(Path(folder) / "float.onnx", shape, **how),
            "uniform 8": measure_file(Path(folder) / "uniform.onnx", shape, **how),
            "plan": measure_file(path, shape, **how),
        }


def uniform(plan: Plan, bits: int) -> Plan:
    """The same sites at one width, activations over the same ranges."""
    return plan.replace(sites=tuple(_at(s, bits) for s in plan.sites), selector="uniform", costs={}, budget=None)


def _at(site: PlanSite, bits: int) -> PlanSite:
    if site.kind == "weight" or site.scale is None or site.zero_point is None:
        return replace(site, bits=bits, code="affine")
    ratio = ((1 << bits) - 1) / ((1 << site.bits) - 1)
    return replace(site, bits=bits, scale=site.scale / ratio, zero_point=round(site.zero_point * ratio))


def _inner(plan: Plan, net: nn.Module) -> Plan:
    """The plan with the names of the network alone; runs name it ``net`` inside their task."""
    names = {n for n, _ in net.named_modules()}
    if all(layer in names for s in plan.sites for layer in s.layers):
        return plan
    sites = tuple(
        replace(s, name=s.name.removeprefix(_TASK), layers=tuple(x.removeprefix(_TASK) for x in s.layers))
        for s in plan.sites
    )
    return plan.replace(sites=sites, layers=())


def show(speeds: dict[str, dict[str, float]], note: str, cfg: DictConfig) -> None:
    """Print the table of sizes and speeds, and say so where low bits bring no time."""
    table = Table(title=f"onnxruntime on this machine's CPU, threads={cfg.threads}")
    for heading in ("", "file", "gzip", "1 image", f"images/s in {cfg.batch_size}s", "memory"):
        table.add_column(heading, justify="left" if not heading else "right")
    for name, s in speeds.items():
        table.add_row(
            name,
            f"{s['file_bytes'] / 1024:,.1f} KiB",
            f"{s['gzip_bytes'] / 1024:,.1f} KiB",
            f"{s['ms']:.3f} ms",
            f"{s['images_per_second']:,.0f}",
            f"{s['peak_bytes'] / 2**20:,.1f} MiB",
        )
    Console().print(table)
    ratio = speeds["float"]["ms"] / speeds["plan"]["ms"]
    if ratio < 1.05:
        print(
            f"Low bits save size here, not time: {ratio:.2f}x the float network's speed. onnxruntime's CPU kernels "
            "turn the weights back into float32 before they multiply."
        )
    if note:
        print(note)
