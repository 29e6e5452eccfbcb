"""Optimizer and learning-rate schedule by name, for every task."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from hawq_lightning._errors import HawqError, nearest

OPTIMIZERS = ("sgd", "adamw")
SCHEDULES = ("onecycle", "cosine", "none")


def check_names(optimizer: str, schedule: str) -> None:
    """Raise HawqError for an optimizer or schedule that does not exist."""
    for value, options, what in ((optimizer, OPTIMIZERS, "optimizer"), (schedule, SCHEDULES, "schedule")):
        if value not in options:
            raise HawqError(
                f"task.{what}={value!r} is unknown; use one of {', '.join(options)}.{nearest(value, options)}"
            )


def make_optimizer(
    parameters: Iterable[nn.Parameter],
    optimizer: str,
    lr: float,
    momentum: float,
    weight_decay: float,
    schedule: str,
    steps: int,
) -> Any:
    """What ``configure_optimizers`` returns; the schedule moves with every step.

    Args:
        parameters: those that need no gradient are left out; only tensors with two axes or more decay, and those that
            say so by an attribute ``decays`` (PACT's clipping points).
        optimizer: ``sgd`` (with Nesterov's momentum) or ``adamw``.
        lr: the peak learning rate.
        momentum: of SGD.
        weight_decay: decoupled in AdamW.
        schedule: ``onecycle``, ``cosine`` or ``none``.
        steps: optimizer steps of the whole run.
    """
    free = [p for p in parameters if p.requires_grad]
    decaying = [p for p in free if p.ndim > 1 or getattr(p, "decays", False)]
    decaying_ids = {id(p) for p in decaying}
    groups = [
        {"params": decaying, "weight_decay": weight_decay},
        {"params": [p for p in free if id(p) not in decaying_ids], "weight_decay": 0.0},
    ]
    built: torch.optim.Optimizer
    if optimizer == "sgd":
        built = torch.optim.SGD(groups, lr=lr, momentum=momentum, nesterov=momentum > 0)
    else:
        built = torch.optim.AdamW(groups, lr=lr)
    steps = max(1, steps)
    scheduler: torch.optim.lr_scheduler.LRScheduler
    if schedule == "onecycle":
        scheduler = torch.optim.lr_scheduler.OneCycleLR(built, max_lr=lr, total_steps=steps)
    elif schedule == "cosine":
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(built, T_max=steps)
    else:
        return built
    return {"optimizer": built, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
