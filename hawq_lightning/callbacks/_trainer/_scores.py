"""Scores that callbacks and schedulers keep of a training; those of the float network are of another one."""

from __future__ import annotations

import torch
from lightning.pytorch import Trainer

from hawq_lightning.callbacks._trainer._namespaces import kinds


def scores_begin_anew(trainer: Trainer) -> list[str]:
    """Forget the best scores of ``ModelCheckpoint``, ``EarlyStopping`` and ``ReduceLROnPlateau``; files are kept.

    Returns:
        who had one, for a message.
    """
    names = []
    checkpoints, stoppers = kinds("callbacks.ModelCheckpoint"), kinds("callbacks.EarlyStopping")
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, checkpoints) and callback.monitor is not None:
            if callback.best_model_score is None and not callback.best_k_models:
                continue
            worst = torch.tensor(float("inf") if callback.mode == "min" else -float("inf"))
            callback.best_k_models, callback.kth_best_model_path, callback.kth_value = {}, "", worst
            callback.best_model_path, callback.best_model_score, callback.current_score = "", None, None
        elif isinstance(callback, stoppers):
            worst = torch.tensor(float("inf") if callback.mode == "min" else -float("inf"))
            if callback.best_score.isinf() and not callback.wait_count:
                continue
            callback.best_score, callback.wait_count = worst, 0
        else:
            continue
        names.append(f"{type(callback).__name__}(monitor={callback.monitor!r})")
    for config in trainer.lr_scheduler_configs if trainer.state.fn == "fit" else ():
        scheduler = config.scheduler
        if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau) and scheduler.last_epoch > 0:
            scheduler._reset()
            names.append("ReduceLROnPlateau")
    return names
