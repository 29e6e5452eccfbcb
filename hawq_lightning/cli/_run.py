"""The run itself: float training, traces and plan, fine-tuning, packed file, report."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.core.hooks import DataHooks
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from hawq_lightning._extra import require
from hawq_lightning._plan import Plan
from hawq_lightning._progress import seconds_since
from hawq_lightning._shares import binary_size, compression_text
from hawq_lightning._tensor_sizes import size_of
from hawq_lightning._types import JsonObject
from hawq_lightning.callbacks import HAWQ, overrides
from hawq_lightning.callbacks.fault_tolerance import KeepRandomStates
from hawq_lightning.cli._build import (
    check_one_namespace,
    check_settings,
    hooks_of,
    make_callback,
    make_companions,
    make_data,
    make_task,
    make_trainer,
)
from hawq_lightning.cli._calibration import CalibrationBatches
from hawq_lightning.cli._figures import PaperFigures
from hawq_lightning.cli._hydra_files import files_named, write_hydra_files, writes_hydra_files
from hawq_lightning.cli._onnx import FILE, ONNX, write_onnx
from hawq_lightning.cli._recorder import CommitAtFirstBatch, Recorder, scores
from hawq_lightning.cli._records import MONITOR, read_record
from hawq_lightning.cli._resume import RunState, check_checkpoint, settings_hash
from hawq_lightning.cli._run_folder import HYDRA, RunFolder, result_names
from hawq_lightning.cli._targets import is_own
from hawq_lightning.export import load_packed


def run(cfg: DictConfig) -> JsonObject:
    """Carry out a configuration and leave everything in its run folder.

    A finished run with the same settings in the same folder is not repeated; an unfinished one goes on from its last
    checkpoint. A folder with results of other settings, or with files that no run made, is refused; with
    ``overwrite=true`` the results go as soon as there are new ones.

    With ``epochs=0`` nothing is fine-tuned: traces, plan, the score right after quantizing, packed file and report.

    Returns:
        What metrics.json holds.

    Raises:
        HawqError: bad input of any kind.
    """
    check_settings(cfg)
    if cfg.onnx:  # found missing now, not after the training
        for package in (*ONNX.packages, "onnxruntime"):
            require(package)
    if cfg.ckpt_path is not None:
        check_checkpoint(cfg.ckpt_path)
    place = RunFolder(
        Path(cfg.paths.output_dir), (*result_names(), *HYDRA) if writes_hydra_files(cfg) else result_names()
    )
    progress = RunState(place, settings_hash(cfg))
    if rank_zero_only.rank != 0:  # type: ignore[attr-defined]
        progress.check(cfg.overwrite)
        return _run(cfg, progress)
    place.refuse_strangers()  # before even the lock is written there
    with place.locked():
        place.put_back()  # what a killed run set aside
        progress.check(cfg.overwrite)
        try:
            record = _run(cfg, progress)
        finally:
            place.put_back()
        place.note_files()
        return record


def _run(cfg: DictConfig, progress: RunState) -> JsonObject:
    folder = progress.folder.folder
    resume = bool(cfg.resume) and cfg.ckpt_path is None
    if resume and (finished := progress.finished()) is not None:
        print(f"finished already, not repeated (resume=false repeats it): {folder}")
        _report(cfg, folder, only_missing=True)
        if cfg.onnx and not (folder / FILE).is_file():  # what failed then may work now
            data, task = make_data(cfg), make_task(cfg)
            hooks = hooks_of(task, data)
            hooks.setup("validate")
            load_packed(folder / "model.safetensors", task)
            _write_onnx(folder, task, hooks)
        return finished
    folder.mkdir(parents=True, exist_ok=True)
    pl.seed_everything(cfg.seed, workers=True, verbose=False)
    data, task = make_data(cfg), make_task(cfg)
    check_one_namespace(task, data)
    hawq = make_callback(cfg)
    hawq.measure_callback.only_needed = bool(cfg.epochs)  # without a training the traces are what is wanted
    checkpoint = cfg.ckpt_path
    record = progress.unfinished() if resume else None
    if record is None:
        record = _empty_record(cfg, task) | {"settings": progress.settings}
        if rank_zero_only.rank == 0:  # type: ignore[attr-defined]
            progress.begin(stays=files_named(cfg, folder))
            write_hydra_files(cfg)
            progress.keep(record)
    else:
        print(f"goes on where it stopped: {folder}")
        checkpoint = progress.checkpoint("fine_tuning")
    if checkpoint is None:
        train_float(cfg, task, data, record, progress, hawq)
    recorder = Recorder(hawq, folder, record, progress)
    extra = [PaperFigures(hawq, folder / "figures")] if cfg.get("paper_figures") else []
    trainer = make_trainer(
        cfg, "fine_tuning", [hawq, *make_companions(cfg), recorder, *extra], task, max_epochs=cfg.epochs
    )
    trainer.fit(task, datamodule=data, ckpt_path=checkpoint)
    if not trainer.is_global_zero:
        return record
    written: JsonObject = read_record(folder / "metrics.json")
    try:
        if cfg.onnx:
            _write_onnx(folder, task, hooks_of(task, data))
    finally:  # also where the network turns out not to be exportable
        _report(cfg, folder)
    show(written, folder)
    return written


def _write_onnx(folder: Path, task: pl.LightningModule, hooks: DataHooks) -> None:
    batches = hooks.val_dataloader()
    seen = CalibrationBatches(hooks, batches)
    write_onnx(folder, task, Plan.load(folder / "plan.json"), batches, seconds=0.5, calibration=seen)


def _empty_record(cfg: DictConfig, task: pl.LightningModule) -> JsonObject:
    state = task.state_dict().values()
    return {
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "name": cfg.name,
        "seed": cfg.seed,
        "sizes": {"float_bytes": size_of(t for t in state if isinstance(t, torch.Tensor)).float32_bytes},
        "seconds": {},
        "history": [],
    } | ({} if cfg.get("monitor") is None else {MONITOR: {"name": cfg.monitor}})


def _report(cfg: DictConfig, folder: Path, only_missing: bool = False) -> None:
    if cfg.report and not (only_missing and (folder / "report.html").is_file()):
        from hawq_lightning.report import model_card, write_report

        write_report(folder, title=cfg.name)
        if not RunFolder(folder).changed():
            model_card(folder, title=cfg.name)


def train_float(
    cfg: DictConfig,
    task: pl.LightningModule,
    data: pl.LightningDataModule | None,
    record: JsonObject,
    progress: RunState,
    hawq: HAWQ,
) -> None:
    """Train the float network for ``float_epochs`` and note its score; without epochs only the score.

    What ``hawq`` cannot do afterwards is told before: a budget that no plan meets, a plan of another network. A
    LightningModule of the user's own keeps its learning rate.
    """
    start = time.perf_counter()
    fine_tuning_lr = task.lr if is_own(type(task)) else None
    float_checkpoint = progress.checkpoint("float") if cfg.resume else None
    extra: list[pl.Callback] = [KeepRandomStates(), CommitAtFirstBatch(progress)]
    if float_checkpoint is None:
        extra.append(pl.callbacks.LambdaCallback(on_fit_start=hawq.check_early))
    trainer = make_trainer(cfg, "float", extra, task, max_epochs=cfg.float_epochs, num_sanity_val_steps=0)
    if cfg.float_epochs:
        if fine_tuning_lr is not None:
            task.lr = cfg.float_lr
        trainer.fit(task, datamodule=data, ckpt_path=float_checkpoint)
        if fine_tuning_lr is not None:
            task.lr = fine_tuning_lr
    validates = trainer.limit_val_batches and cfg.float_validation and _can_validate(task, data)
    results: Any = trainer.validate(task, datamodule=data, verbose=False) if validates else []
    for name, value in scores(results[0] if results else {}, cfg.get("monitor")).items():
        record.setdefault(name, {})["float"] = value
    label = "float_training" if cfg.float_epochs else "float_validation"
    record["seconds"][label] = record["seconds"].get(label, 0.0) + seconds_since(start)
    if trainer.is_global_zero:
        progress.keep(record)


def _can_validate(task: pl.LightningModule, data: pl.LightningDataModule | None) -> bool:
    """Whether there is a validation step, and a loader for it."""
    return overrides("val_dataloader", hooks_of(task, data)) and overrides("validation_step", task)


def show(record: JsonObject, folder: Path) -> None:
    """Print the table that a user came for."""
    console = Console()
    known = ((MONITOR, 1), ("accuracy", 100), ("map", 100), ("loss", 1))
    metric, scale = next(((m, s) for m, s in known if m in record), ("", 1))
    name = record[MONITOR]["name"] if metric == MONITOR else metric
    table = Table(title=f"{record['name']}, seed {record['seed']}")
    for heading in ("", name or "score", "quantized weights", "file"):
        table.add_column(heading, justify="left" if not heading else "right")
    sizes = record["sizes"]
    ratio = sizes["float_weight_bytes"] / sizes["weight_bytes"]
    for key, label in (("float", "float"), ("quantized", "quantized"), ("fine_tuned", "fine-tuned")):
        value = record.get(metric, {}).get(key)
        cell = "-" if value is None else (f"{scale * value:.2f}%" if scale == 100 else f"{value:.4f}")
        if key == "float":
            cells = [binary_size(sizes["float_weight_bytes"]), binary_size(sizes["float_bytes"])]
        elif key == "fine_tuned" and value is None:
            continue
        else:
            cells = [f"{binary_size(sizes['weight_bytes'])} ({ratio:.1f}x)", binary_size(sizes["file_bytes"])]
        table.add_row(label, cell, *cells)
    console.print(table)
    print(f"smaller: {compression_text(record.get('costs') or sizes)}")
    seconds = ", ".join(f"{k.replace('_', ' ')} {v:.0f} s" for k, v in record["seconds"].items())
    console.print(seconds, highlight=False)
    print(f"run folder: {folder}")
