"""Turning the composed configuration into data, network, task, callbacks and Trainers."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch import nn

from hawq_lightning._errors import HawqError
from hawq_lightning.callbacks import HAWQ, runs_script_again
from hawq_lightning.callbacks.fault_tolerance import write_checkpoints_atomically
from hawq_lightning.quantization import import_quantizers


def check_settings(cfg: DictConfig) -> None:
    """Raise HawqError for numbers of the top level that make no sense."""
    for key in ("float_epochs", "epochs"):
        if not isinstance(cfg[key], int) or cfg[key] < 0:
            raise HawqError(f"{key}={cfg[key]!r} must be a whole number, 0 or more.")
    if not isinstance(cfg.seed, int) or cfg.seed < 0:
        raise HawqError(f"seed={cfg.seed!r} must be a whole number, 0 or more.")
    if cfg.float_epochs and not (isinstance(cfg.float_lr, (int, float)) and cfg.float_lr > 0):
        raise HawqError(f"float_lr={cfg.float_lr!r} must be a positive number.")


def make_data(cfg: DictConfig) -> pl.LightningDataModule:
    """The DataModule of the group ``data``."""
    data: pl.LightningDataModule = instantiate(cfg.data, _convert_="all")
    return data


def make_task(cfg: DictConfig) -> pl.LightningModule:
    """The task of the group ``task`` around the network of the group ``model``."""
    net: nn.Module = instantiate(cfg.model, _convert_="all")
    task: pl.LightningModule = instantiate(cfg.task, net=net, _convert_="all")
    return task


def make_callback(cfg: DictConfig) -> HAWQ:
    """The callback of the group ``hawq``; the user's own modules, with quantizers and so on, are imported first."""
    import_quantizers(cfg.imports or ())
    callback: HAWQ = instantiate(cfg.hawq, _convert_="all")
    return callback


def make_companions(cfg: DictConfig) -> list[pl.Callback]:
    """The callbacks of the group ``fine_tuning``."""
    return [instantiate(node, _convert_="all") for node in (cfg.fine_tuning or {}).values() if node]


def make_trainer(cfg: DictConfig, phase: str, extra: list[pl.Callback], **changes: Any) -> pl.Trainer:
    """A Trainer with the loggers and callbacks of the configuration.

    Args:
        cfg: all of it; its ``phase`` is set.
        phase: ``float`` or ``fine_tuning``.
        extra: callbacks that come before the configured ones.
        changes: arguments of the Trainer to override.
    """
    cfg.phase = phase
    callbacks = [instantiate(c, _convert_="all") for c in (cfg.callbacks or {}).values() if c]
    loggers = [instantiate(c, _convert_="all") for c in (cfg.logger or {}).values() if c]
    if not any(isinstance(c, pl.callbacks.Checkpoint) for c in callbacks):
        changes.setdefault("enable_checkpointing", False)
    if not any(isinstance(c, pl.callbacks.ProgressBar) for c in callbacks):
        changes.setdefault("enable_progress_bar", False)
    trainer: pl.Trainer = instantiate(
        cfg.trainer,
        callbacks=[*extra, *callbacks],
        logger=loggers or False,
        default_root_dir=cfg.paths.output_dir,
        _convert_="all",
        **changes,
    )
    write_checkpoints_atomically(trainer)
    if _in_sweep() and runs_script_again(trainer):
        raise HawqError(
            f"trainer.strategy={cfg.trainer.strategy} starts its processes by running the whole command again, which "
            "in a sweep (-m) would be the whole sweep: use trainer=ddp_spawn, or launcher=slurm with "
            f"hydra.launcher.tasks_per_node={trainer.num_devices}."
        )
    return trainer


def _in_sweep() -> bool:
    return HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN
