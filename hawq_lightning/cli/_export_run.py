"""What ``hawq-lightning-export`` does with a run folder."""

from __future__ import annotations

import inspect
import math
import pickle
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
import yaml
from lightning.pytorch.core.hooks import DataHooks
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import nn

from hawq_lightning._batches import image_tensors
from hawq_lightning._errors import HawqError
from hawq_lightning._io import json_text, write_text
from hawq_lightning._plan import Plan
from hawq_lightning._types import Batch, JsonObject
from hawq_lightning.cli._build import make_data, make_net, make_task
from hawq_lightning.cli._calibration import IMAGES, CalibrationBatches
from hawq_lightning.cli._onnx import FILE, INTEGER, INTEGER_FILE, ONNX, Images, write_onnx
from hawq_lightning.cli._resume import check_checkpoint
from hawq_lightning.cli._run_folder import RunFolder
from hawq_lightning.cli._speeds import TASK, inner, show, speeds
from hawq_lightning.cli._trusted import check_targets
from hawq_lightning.export import EXPORTERS, Exporter, check_writable, compare, export, load_packed, network_of
from hawq_lightning.export.onnx import check_runtime, layer_latencies, write_table
from hawq_lightning.quantization import import_quantizers, unquantize
from hawq_lightning.report import model_card, write_report

_TABLES = ("latency.csv", "latency_openvino.csv")
_WRITTEN = (*_TABLES, "export.json")
# 0.1.0 named files, which are private now: hawq_lightning.data.digits.DigitsDataModule
_TARGET_OF_0_1_0 = re.compile(r"hawq_lightning\.(data|models)\.[a-z0-9_]+\.(?P<name>\w+)")
_NO_DOWNLOAD = {"weights": None, "pretrained": False, "pretrained_backbone": False}


def export_run(cfg: DictConfig) -> JsonObject:
    """Write ``model.onnx`` and the other formats, ``latency.csv`` and ``export.json`` into a run folder.

    Returns:
        What export.json holds.

    Raises:
        HawqError: no run there, a setting makes no sense, the extra ``export`` is missing, or the network cannot be
            exported.
    """
    _check(cfg)
    runtimes = ["onnxruntime", *(r for r in _runtimes(cfg) if r != "onnxruntime")]  # all the rest goes by the first
    for runtime in runtimes:
        check_runtime(runtime)
    folder = Path(cfg.run_folder)
    imports = [cfg.imports] if isinstance(cfg.get("imports"), str) else list(cfg.get("imports") or ())
    run = _settings(folder, cfg.data_root, imports)
    of_onnx = [ONNX.name, *([INTEGER.name] if cfg.get("integer") else [])] if cfg.get("onnx", True) else []
    names = dict.fromkeys((*of_onnx, *(cfg.get("formats") or ())))
    exporters = [EXPORTERS[name] for name in names]
    written = (*(name for e in exporters for name in e.files("model")), *_WRITTEN)
    place = RunFolder(folder, written)
    place.refuse_strangers()
    for name in written:
        check_writable(folder / name)
    with place.locked():
        record = _export(cfg, run, folder, exporters, runtimes)
        place.note_files()
    print(f"written: {', '.join(sorted(p.name for p in folder.glob('model.*')))}")
    return record


def _export(
    cfg: DictConfig, run: DictConfig, folder: Path, exporters: Sequence[Exporter], runtimes: Sequence[str]
) -> JsonObject:
    plan = Plan.load(folder / "plan.json")
    net = load_packed(folder / "model.safetensors", _fresh(run)).eval()
    for exporter in exporters:
        exporter.check(network_of(net), verify=cfg.images != 0)
    hooks, batches = _batches(run)
    seen = CalibrationBatches(hooks, batches)
    free = cfg.get("free_batch", True)
    real = Images(net, batches, free)
    first = real.first()
    how = {"fold": cfg.fold, "exact": cfg.exact, "storage": cfg.storage, "free_batch": free, "free_size": cfg.free_size}
    with_onnx, record = ONNX in exporters, {}
    if with_onnx:
        record = write_onnx(
            folder, net, plan, batches, cfg.images, score=cfg.score, integer=cfg.integer, calibration=seen,
            seven_bits=cfg.seven_bits, **how,
        )  # fmt: skip
    for runtime in runtimes[1:]:
        if cfg.images != 0 and with_onnx:
            agreement = compare(network_of(net), folder / FILE, real, images=cfg.images, runtime=runtime)
            record[f"agreement_{runtime}"] = agreement.to_dict()
            print(f"{FILE}: {agreement}")
    for exporter in (e for e in exporters if e not in (ONNX, INTEGER)):
        path = folder / f"model{exporter.suffix}"
        offered = how | {"batches": image_tensors(Images(net, seen, free, real.size), IMAGES)}
        options = {k: v for k, v in offered.items() if k in inspect.signature(exporter.write).parameters}
        export(network_of(net), inner(plan, net), path, exporter.name, example_input=first, **options)
        sizes = record.setdefault("files", {})
        sizes |= {name: (folder / name).stat().st_size for name in exporter.files("model")}
        if exporter.verify is not None and cfg.images != 0:
            verified = exporter.verify(network_of(net), path, real, cfg.images)
            record.setdefault("verified", {})[path.name] = verified.to_dict()
            print(f"{path.name}: {verified}")
    if cfg.speed and with_onnx:
        whole, note = _float_network(run, folder)
        fast = folder / INTEGER_FILE if cfg.integer else None
        record |= speeds(
            network_of(whole), plan, first, folder / FILE, integer=fast, threads=cfg.threads,
            batch_size=cfg.batch_size, seconds=cfg.seconds, how=how, runtimes=runtimes,
        )  # fmt: skip
        show(record, note)
    if cfg.table and with_onnx:
        inner_plan = inner(plan, net)
        for runtime, name in zip(runtimes, _TABLES):
            rows = layer_latencies(
                network_of(net), inner_plan, (first[:1] if free else first,), threads=cfg.threads, runtime=runtime
            )
            if inner_plan is not plan:  # the run reads the table under its own names
                rows = [{**row, "layer": f"{TASK}{row['layer']}"} for row in rows]
            write_table(rows, folder / name)
    write_text(folder / "export.json", json_text(record, indent=1))
    _tell(run, folder)
    return record


def _check(cfg: DictConfig) -> None:
    for key, least in (("images", 0), ("batch_size", 1), ("threads", 1)):
        value = cfg[key]
        if not (value is None and key == "images") and (type(value) is not int or value < least):
            raise HawqError(f"{key}={value!r} must be a whole number, {least} or more.")
    if type(free := cfg.get("free_batch", True)) is not bool:
        raise HawqError(f"free_batch={free!r} must be true or false.")
    if type(cfg.seconds) not in (int, float) or not 0 < cfg.seconds < math.inf:
        raise HawqError(f"seconds={cfg.seconds!r} must be a positive number.")


def _runtimes(cfg: DictConfig) -> list[str]:
    named = cfg.get("runtimes") or ()
    return [named] if isinstance(named, str) else list(named)


def _tell(run: DictConfig, folder: Path) -> None:
    """The run's report and card again, now with what was exported."""
    if (folder / "report.html").is_file():
        if not RunFolder(folder).changed():
            model_card(folder, title=run.get("name"))
            RunFolder(folder).note_card()
        write_report(folder, title=run.get("name"))


def _module(name: str) -> str:
    """``my_quantizers`` for ``my_quantizers.py`` as well, wherever it lies now."""
    return Path(name).stem if str(name).endswith(".py") else str(name)


def _settings(folder: Path, data_root: str | None, imports: Sequence[str]) -> DictConfig:
    path = folder / ".hydra" / "config.yaml"
    if not path.is_file():
        raise HawqError(f"There is no run at {folder}: {path} is missing.")
    try:
        run = OmegaConf.load(path)
        known = run if isinstance(run, DictConfig) else OmegaConf.create()
        network = "task" if known.get("model") is None else "model"  # a LightningModule with a network of its own
        own_loaders = network == "task" and known.get("data") is None
        parts = (network, *(() if own_loaders else ("data",)), "paths", "quantizer")
        if not isinstance(run, DictConfig) or not all(isinstance(run.get(part), DictConfig) for part in parts):
            raise HawqError(f"{path} holds no settings of a run.")
    except (OSError, UnicodeDecodeError, yaml.YAMLError, OmegaConfBaseException) as error:
        raise HawqError(f"{path} is corrupt or cut short: {' '.join(str(error).split())}.") from error
    OmegaConf.set_struct(run, False)
    noted = run.get("imports") or run.quantizer.get("imports") or ()  # the second: of release 0.1.0
    missing = [n for n in ([noted] if isinstance(noted, str) else noted) if _module(n) not in map(_module, imports)]
    if missing:
        raise HawqError(
            f"The run at {folder} was made with code of its own, {', '.join(map(str, missing))}. A run folder is data "
            f"and runs no code: if you trust it, name it, imports=[{','.join(map(str, missing))}]."
        )
    import_quantizers(imports)
    run.paths.output_dir = str(folder)
    named = [run[key] for key in (network, "data") if run.get(key) is not None]
    for part in named:
        if match := _TARGET_OF_0_1_0.fullmatch(part.get("_target_", "")):
            part._target_ = f"hawq_lightning.{match[1]}.{match['name']}"
    for key in _NO_DOWNLOAD:
        if key in run[network]:
            run[network][key] = _NO_DOWNLOAD[key]
    for part in named:
        check_targets(part, {_module(name) for name in imports}, folder)
    if data_root is not None:
        if run.get("data") is None or "root" not in run.data:
            raise HawqError(f"data_root={str(data_root)!r}: this run's data are not read from a folder.")
        run.data.root = data_root
    return run


def _fresh(run: DictConfig) -> nn.Module:
    return make_task(run) if run.get("model") is None else make_net(run)


def _batches(run: DictConfig) -> tuple[DataHooks, Iterable[Batch]]:
    """Who has the loaders, and the validation batches."""
    data = make_data(run)
    hooks = make_task(run) if data is None else data
    hooks.prepare_data()
    hooks.setup("validate")
    return hooks, hooks.val_dataloader()


def _float_network(run: DictConfig, folder: Path) -> tuple[nn.Module, str]:
    """The network with full-precision weights if the run kept a checkpoint, else with the quantized ones."""
    path = folder / "checkpoints" / "fine_tuning" / "last.ckpt"
    reason = "no checkpoint in the folder"
    if path.is_file():
        try:
            check_checkpoint(path)
            state = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
            net = _fresh(run)
            fresh_state = net.state_dict()
            trained_state = {k.removeprefix(TASK): v for k, v in state.items()}
            if set(fresh_state) <= set(trained_state):
                net.load_state_dict({k: trained_state[k] for k in fresh_state})
                return net.eval(), ""
            reason = f"{path} is of another network"
        except pickle.UnpicklingError:
            reason = f"{path} holds more than tensors and plain values, and is not trusted"
        except Exception as error:  # whatever a damaged archive raises
            reason = f"{path} cannot be read, {type(error).__name__}"
    net = load_packed(folder / "model.safetensors", _fresh(run))
    note = f"float and uniform 8 hold the quantized weights ({reason}): compare their gzip with care"
    return unquantize(net).eval(), note
