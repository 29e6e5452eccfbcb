"""HAWQ's block-wise order: quantizers switched on one group after another, the most sensitive first."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import Literal, get_args

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from hawq_lightning._config import whole
from hawq_lightning._errors import HawqError, choice
from hawq_lightning._plan import PlanSite
from hawq_lightning._types import Batch
from hawq_lightning.callbacks._apply import quantizing_callback
from hawq_lightning.callbacks._companion import Companion
from hawq_lightning.callbacks._schedule_time import ScheduleTime, training_share
from hawq_lightning.quantization import (
    QuantizedOperand,
    QuantizedWeight,
    Quantizer,
    enabled_bits,
    quantized_reads,
    quantizers,
)

Order = Literal["omega", "omega_ascending"]


class BlockwiseOrder(Companion):
    """Fine-tune block-wise in the order of Omega (Dong et al., HAWQ, ICCV 2019, section 3.3).

    All quantizers are enabled from the start, so that checkpoints hold the whole plan, but paused until their turn: the
    sites with the largest Omega first. The network between them trains on. Validation always sees all of them at work,
    so scores along the training are of one network and can be compared.

    Args:
        by: ``omega``: the largest first; ``omega_ascending``: the reverse, for comparison.
        until: moment at which all are on: an epoch, or a share of the training.
        stages: number of groups; by default one a site.

    Raises:
        HawqError: an unknown order; at the start of ``fit``: no plan, or one without Omega.
    """

    def __init__(self, by: Order = "omega", until: int | float | str = 0.5, stages: int | None = None) -> None:
        self.by = choice("order", by, get_args(Order))
        self.stages = None if stages is None else whole("stages", stages, 1)
        self.until = ScheduleTime(until, "BlockwiseOrder", "until")
        self._groups: list[list[Quantizer]] | None = None
        self._on = 0

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check the schedule against the Trainer, and the plan where there is one by now."""
        self._groups = None
        self.until.check(trainer)
        if enabled_bits(pl_module):
            self._grouped(trainer, pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int) -> None:
        """Switch on whose turn it is."""
        if self._groups is None:
            if not enabled_bits(pl_module):
                return
            self._groups = self._grouped(trainer, pl_module)
            self._on = -1
        due = self._due(trainer, batch_idx)
        if due != self._on:
            self._switch(due)
            rank_zero_info(f"HAWQ: {due} of {len(self._groups)} groups of quantizers are at work.")

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Scores are of the whole plan."""
        self._all_on(pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Back to the stage of the training."""
        if self._groups is not None:
            self._switch(self._on)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """All on, whatever became of the training."""
        if self._groups is not None and self._on < len(self._groups):
            rank_zero_warn(
                f"HAWQ: training ended when {self._on} of {len(self._groups)} groups of quantizers were at work; "
                "the others were never trained with."
            )
        self._groups = None
        self._all_on(pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """All on."""
        self._groups = None
        self._all_on(pl_module)

    def _due(self, trainer: Trainer, batch_idx: int) -> int:
        assert self._groups is not None
        if self.until.reached(trainer, batch_idx):
            return len(self._groups)
        callback = quantizing_callback(trainer)
        start = 0 if callback is None else callback.start_epoch
        begin = start / trainer.max_epochs if trainer.max_epochs and trainer.max_epochs > 0 else 0.0
        end = self.until.as_share(trainer)
        if not end > begin:
            return len(self._groups)
        passed = max(0.0, training_share(trainer, batch_idx) - begin) / (end - begin)
        # the first at once, the last at the very moment
        return min(len(self._groups), 1 + math.floor(passed * (len(self._groups) - 1) + 1e-9))

    def _switch(self, due: int) -> None:
        assert self._groups is not None
        for i, group in enumerate(self._groups):
            for quantizer in group:
                quantizer.fake_quant_disabled = i >= due
        self._on = due

    def _all_on(self, pl_module: LightningModule) -> None:
        for quantizer in quantizers(pl_module):
            quantizer.fake_quant_disabled = False

    def _grouped(self, trainer: Trainer, pl_module: LightningModule) -> list[list[Quantizer]]:
        callback = quantizing_callback(trainer)
        plan = callback.plan if callback is not None and callback.has_plan else None
        missing = [s.name for s in plan.sites if s.omega is None] if plan is not None else ["every site"]
        if plan is None or missing:
            raise HawqError(
                f"BlockwiseOrder({self.by!r}) sorts by Omega, which the plan lacks for {', '.join(missing[:3])}: let "
                "HAWQ measure, or give a plan that it measured."
            )
        layers = quantized_reads(pl_module)
        ranked = sorted(plan.sites, key=lambda s: (s.omega or 0.0, s.name), reverse=self.by == "omega")
        count = min(self.stages or len(ranked), len(ranked))
        bounds = [round(i * len(ranked) / count) for i in range(count + 1)]
        return [[q for s in ranked[a:b] for q in _quantizers_of(s, layers)] for a, b in itertools.pairwise(bounds)]


def _quantizers_of(site: PlanSite, layers: Mapping[str, QuantizedWeight | QuantizedOperand]) -> list[Quantizer]:
    return [layers[name].quantizer_of(site.kind) for name in site.layers if name in layers]
