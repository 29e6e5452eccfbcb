"""A training step in the place of the user's, and a copy of the module for it to compare with."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import TypeAlias

import torch
from lightning.pytorch import LightningModule
from torchmetrics import Metric

from hawq_lightning._errors import HawqError
from hawq_lightning.callbacks._trainer._namespaces import kinds
from hawq_lightning.layers import deep_copy


def float_copy(pl_module: LightningModule) -> LightningModule:
    """A copy of the module as it is, apart from the Trainer, that logs nothing and carries no gradients.

    Raises:
        HawqError: something in it cannot be copied.
    """
    grads = [(p, p.grad) for p in pl_module.parameters()]
    try:
        for p, _ in grads:
            p.grad = None
        frozen = deep_copy(pl_module)
    except Exception as error:
        raise HawqError(f"{type(pl_module).__name__} cannot be copied for distillation: {error}.") from error
    finally:
        for p, grad in grads:
            p.grad = grad
    frozen.requires_grad_(False)
    for module in frozen.modules():
        if isinstance(module, kinds("LightningModule")):
            module.__dict__.pop("training_step", None)  # what was put there belongs to the original
            module.__dict__.update({name: lambda *a, **k: None for name in ("log", "log_dict")})
        if isinstance(module, Metric):
            module.dist_sync_on_step = False
    return frozen


StepOutput: TypeAlias = torch.Tensor | Mapping[str, object] | None
"""What ``training_step`` returns: the loss, a dict with it, or nothing to skip the batch."""

_STEP = "_hawq_lightning_step"


def patch_training_step(pl_module: LightningModule, around: Callable[..., StepOutput]) -> None:
    """Let ``around(step, pl_module, *args)`` run in the place of ``training_step``; doing it twice is no harm."""
    if _STEP in pl_module.__dict__:
        return
    original = pl_module.__dict__.get("training_step")  # torch.compile puts one there
    step = pl_module.training_step
    pl_module.__dict__[_STEP] = original

    @functools.wraps(step)
    def replacement(*args: object, **kwargs: object) -> StepOutput:
        return around(step, pl_module, *args, **kwargs)

    pl_module.__dict__["training_step"] = replacement


def restore_training_step(pl_module: LightningModule) -> None:
    """Undo :func:`patch_training_step`."""
    if _STEP not in pl_module.__dict__:
        return
    original = pl_module.__dict__.pop(_STEP)
    pl_module.__dict__.pop("training_step", None)
    if original is not None:
        pl_module.__dict__["training_step"] = original


def loss_of(output: StepOutput) -> torch.Tensor | None:
    """The loss that a training step returned; ``None``: it skips the batch."""
    loss = output.get("loss") if isinstance(output, Mapping) else output
    return loss if isinstance(loss, torch.Tensor) else None


def with_loss(output: StepOutput, loss: torch.Tensor) -> StepOutput:
    """What a training step returned, with another loss."""
    return {**output, "loss": loss} if isinstance(output, Mapping) else loss
