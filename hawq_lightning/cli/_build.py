"""Turning the composed configuration into data, network, task, callbacks and Trainers."""

from __future__ import annotations

import re
from typing import Any, cast

import lightning.pytorch as pl
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch import nn

from hawq_lightning._errors import HawqError
from hawq_lightning.callbacks import HAWQ, kinds, namespace_of, runs_script_again
from hawq_lightning.cli._plain_checkpoints import write_plain_checkpoints
from hawq_lightning.cli._targets import is_own, made, takes, target_of
from hawq_lightning.quantization import import_quantizers

_OTHER_NAME = "pytorch_lightning"
_PROGRESS = "hawq_lightning.cli.PlainProgressBar"


def check_settings(cfg: DictConfig) -> None:
    """Raise HawqError for numbers of the top level that make no sense."""
    for key in ("float_epochs", "epochs"):
        if not isinstance(cfg[key], int) or cfg[key] < 0:
            raise HawqError(f"{key}={cfg[key]!r} must be a whole number, 0 or more.")
    if not isinstance(cfg.seed, int) or cfg.seed < 0:
        raise HawqError(f"seed={cfg.seed!r} must be a whole number, 0 or more.")
    if cfg.float_epochs and not (isinstance(cfg.float_lr, (int, float)) and cfg.float_lr > 0):
        raise HawqError(f"float_lr={cfg.float_lr!r} must be a positive number.")


def make_data(cfg: DictConfig) -> pl.LightningDataModule | None:
    """The DataModule of the group ``data``; ``None`` with ``data=null``: the task has loaders of its own.

    Raises:
        HawqError: no such class, or it is no LightningDataModule.
    """
    if cfg.get("data") is None:
        return None
    data = made(cfg.data, "data")
    if not isinstance(data, kinds("LightningDataModule")):
        raise HawqError(_of_another_kind("data", cfg.data._target_, data, "LightningDataModule"))
    return cast(pl.LightningDataModule, data)


def make_task(cfg: DictConfig) -> pl.LightningModule:
    """The task of the group ``task`` around the network of the group ``model``.

    A task of the user's own that takes no network gets none. A ``model`` that is a LightningModule is the task itself.

    Raises:
        HawqError: no such class, one of another kind, or a task and a network that do not fit together.
    """
    target = None if cfg.get("task") is None else target_of(cfg.task, "task")
    own_task = target is None or is_own(target)
    argument = None if target is None else _argument(target)
    needs_net = target is None or argument is not None
    net = make_net(cfg) if cfg.get("model") is not None and needs_net else None
    if own_task and isinstance(net, kinds("LightningModule")):
        return cast(pl.LightningModule, net)
    if target is None:
        raise HawqError(
            "task=null needs a model that is a LightningModule; there is "
            + ("none: give model._target_." if net is None else f"{cfg.model._target_}, a {type(net).__name__}.")
        )
    if not needs_net and cfg.get("model") is not None and not is_own(target_of(cfg.model, "model")):
        raise HawqError(
            f"task._target_={cfg.task._target_} takes no net, and model._target_={cfg.model._target_} is one: give the "
            "class an argument 'net', or leave the network to it (model=null)."
        )
    if net is None and own_task:
        raise HawqError(
            f"model=null leaves {cfg.task._target_} without a network: give task=lightning_module, or a model."
        )
    task = made(cfg.task, "task", **({} if net is None else {str(argument): net}))
    if not isinstance(task, kinds("LightningModule")):
        raise HawqError(_of_another_kind("task", cfg.task._target_, task, "LightningModule"))
    return cast(pl.LightningModule, task)


def hooks_of(task: pl.LightningModule, data: pl.LightningDataModule | None) -> pl.core.hooks.DataHooks:
    """Who has the loaders: the DataModule, or without one the task."""
    return task if data is None else data


def make_net(cfg: DictConfig) -> nn.Module:
    """The network of the group ``model``.

    Raises:
        HawqError: no such class or function, or what it makes is no module.
    """
    net = made(cfg.model, "model")
    if not isinstance(net, nn.Module):
        raise HawqError(_of_another_kind("model", cfg.model._target_, net, "nn.Module"))
    return net


def _argument(task: object) -> str | None:
    """What a task calls its network, ``None`` if it takes none."""
    return next((name for name in ("net", "model", "network", "backbone") if takes(task, name)), None)


def _of_another_kind(group: str, target: str, made: object, kind: str) -> str:
    said = f"{group}._target_={target} makes a {type(made).__name__}, which is no {kind}"
    if group == "task" and isinstance(made, nn.Module):
        return f"{said}; give a plain network as model._target_."
    return f"{said}."


def make_callback(cfg: DictConfig) -> HAWQ:
    """The callback of the group ``hawq``; the user's own modules, with quantizers and so on, are imported first."""
    import_quantizers(cfg.imports or ())
    callback: HAWQ = instantiate(cfg.hawq, _convert_="all")
    return callback


def make_companions(cfg: DictConfig) -> list[pl.Callback]:
    """The callbacks of the group ``fine_tuning``."""
    return [instantiate(node, _convert_="all") for node in (cfg.fine_tuning or {}).values() if node]


def make_trainer(
    cfg: DictConfig, phase: str, extra: list[pl.Callback], task: pl.LightningModule, **changes: Any
) -> pl.Trainer:
    """A Trainer with the loggers and callbacks of the configuration, of the name of Lightning that the task is of.

    Args:
        cfg: all of it; its ``phase`` is set.
        phase: ``float`` or ``fine_tuning``.
        extra: callbacks that come before the configured ones.
        task: what it is for.
        changes: arguments of the Trainer to override.
    """
    cfg.phase = phase
    callbacks = [_made_beside(task, c) for c in (cfg.callbacks or {}).values() if c]
    loggers = [_made_beside(task, c) for c in (cfg.logger or {}).values() if c]
    if not any(isinstance(c, kinds("callbacks.Checkpoint")) for c in callbacks):
        changes.setdefault("enable_checkpointing", False)
    if not any(isinstance(c, kinds("callbacks.ProgressBar")) for c in callbacks):
        changes.setdefault("enable_progress_bar", False)
    trainer: pl.Trainer = _made_beside(
        task,
        cfg.trainer,
        callbacks=[*extra, *callbacks],
        logger=loggers or False,
        default_root_dir=cfg.paths.output_dir,
        **changes,
    )
    write_plain_checkpoints(trainer)
    if _in_sweep() and runs_script_again(trainer):
        raise HawqError(
            f"trainer.strategy={cfg.trainer.strategy} starts its processes by running the whole command again, which "
            "in a sweep (-m) would be the whole sweep: use trainer=ddp_spawn, or launcher=slurm with "
            f"hydra.launcher.tasks_per_node={trainer.num_devices}."
        )
    return trainer


def check_one_namespace(task: pl.LightningModule, data: pl.LightningDataModule | None) -> None:
    """Lightning has two names, whose Trainers take no classes of the other.

    Raises:
        HawqError: the task is of one and the DataModule of the other.
    """
    names = [namespace_of(x) for x in (task, data) if x is not None]
    if len(set(names)) > 1:
        raise HawqError(
            f"task={type(task).__name__} is of {names[0]} and data={type(data).__name__} of {names[1]}: one Trainer "
            "cannot run both; import the same name of Lightning in both (the same code)."
        )


def _made_beside(task: pl.LightningModule, node: DictConfig, **more: Any) -> Any:
    """What a node of the configuration describes, of the name of Lightning that the task is of."""
    if namespace_of(task) == _OTHER_NAME:
        node = node.copy()
        target = {_PROGRESS: f"{_OTHER_NAME}.callbacks.RichProgressBar"}.get(node._target_, node._target_)
        node._target_ = re.sub(r"^lightning\.pytorch\.", f"{_OTHER_NAME}.", target)
    return instantiate(node, _convert_="all", **more)


def _in_sweep() -> bool:
    return HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN
