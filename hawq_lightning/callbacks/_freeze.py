"""Freezing by schedule: BatchNorm's statistics, and the ranges of the quantizers."""

from __future__ import annotations

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn

from hawq_lightning._types import Batch, Outputs
from hawq_lightning.callbacks._companion import Companion
from hawq_lightning.callbacks._schedule_time import ScheduleTime
from hawq_lightning.quantization import enabled_bits, quantizers


class FreezeSchedule(Companion):
    """Fix BatchNorm's statistics and the quantizers' ranges from some moment of the training on.

    At few bits both follow the noise of rounding. A BatchNorm layer in evaluation mode no longer bounds what a step
    does, so that the learning rate must be smaller from then on: MobileNet on CIFAR-10, fixed from the start, ended at
    chance with 0.01 and at 82% with 0.001, where 82% is what it has without (``recipes/compare``).

    A moment is an epoch (``3``), a share of the training (``0.8`` or ``"80%"``), or ``None``: never. What is frozen
    follows from the training's progress, so a resumed training goes on as it was.

    Args:
        batchnorm: from when on BatchNorm layers use their running statistics, and no longer change them. Their
            affine parameters go on learning.
        ranges: from when on learned steps stay where they are, and ranges are no longer re-estimated.

    Raises:
        HawqError: no valid moment; at the start of ``fit``: a share of a training that has no known end.
    """

    def __init__(self, batchnorm: int | float | str | None = None, ranges: int | float | str | None = None) -> None:
        self.batchnorm = None if batchnorm is None else ScheduleTime(batchnorm, "FreezeSchedule", "batchnorm")
        self.ranges = None if ranges is None else ScheduleTime(ranges, "FreezeSchedule", "ranges")
        self._stopped: list[nn.Module] = []
        self._held: list[tuple[torch.Tensor, torch.Tensor]] | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check the schedule against the Trainer."""
        for moment in (self.batchnorm, self.ranges):
            if moment is not None:
                moment.check(trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int) -> None:
        """Freeze what is due; modules that were put into training mode again are stopped again."""
        if self.batchnorm is not None and self.batchnorm.reached(trainer, batch_idx):
            for module in pl_module.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training:
                    module.training = False
                    self._stopped.append(module)
        due = self.ranges is not None and self._held is None and self.ranges.reached(trainer, batch_idx)
        if due and enabled_bits(pl_module):  # before that there are no ranges to hold
            self._held = []
            for quantizer in quantizers(pl_module):
                quantizer.range_updates_enabled = False
                self._held += [(p, p.detach().clone()) for p in quantizer.parameters()]

    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Outputs, batch: Batch, batch_idx: int
    ) -> None:
        """Frozen parameters go back to where they were: gradient, momentum and weight decay move them still."""
        for parameter, value in self._held or ():
            parameter.copy_(value)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave modes as they were found."""
        for module in self._stopped:
            module.training = True
        self._stopped = []
        if self._held is not None:
            for quantizer in quantizers(pl_module):
                quantizer.range_updates_enabled = True
        self._held = None

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """As at the end."""
        self.on_train_end(trainer, pl_module)
