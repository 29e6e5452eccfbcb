"""HAWQ's block-wise order: quantizers switched on one group after another, the most sensitive first."""

from __future__ import annotations

import itertools
import math
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from hawq_lightning._errors import HawqError, nearest
from hawq_lightning._plan import Plan, PlanSite
from hawq_lightning.callbacks._schedule_time import ScheduleTime, training_share
from hawq_lightning.quantization import Quantizer, enabled_bits, quantized_layers, quantizers

ORDERS = ("omega", "omega_ascending")


class BlockwiseOrder(Callback):
    """Fine-tune block-wise in the order of Omega (Dong et al., HAWQ, ICCV 2019, section 3.3).

    All quantizers are armed from the start, so that checkpoints hold the whole plan, but paused until their turn: the
    sites with the largest Omega first. The network between them trains on. Validation always sees all of them at work,
    so scores along the training are of one network and can be compared.

    Args:
        by: ``omega``: the largest first; ``omega_ascending``: the reverse, for comparison.
        until: moment at which all are on: an epoch, or a share of the training.
        stages: number of groups; by default one a site.
        start: epochs of float training that come before.

    Raises:
        HawqError: an unknown order; at the start of ``fit``: a plan without Omega.
    """

    def __init__(self, by: str = "omega", until: Any = 0.5, stages: int | None = None, start: int = 0) -> None:
        if by not in ORDERS:
            raise HawqError(f"order={by!r} is unknown; use one of {', '.join(ORDERS)}.{nearest(str(by), ORDERS)}")
        if stages is not None and (isinstance(stages, bool) or not isinstance(stages, int) or stages < 1):
            raise HawqError(f"stages={stages!r}; it is a number of groups, 1 or more.")
        self.by, self.stages, self.start = by, stages, start
        self.until = ScheduleTime(until, "order_until")
        self._groups: list[list[Quantizer]] | None = None
        self._on = 0

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check the schedule against the Trainer, and the plan where there is one by now."""
        self._groups = None
        self.until.check(trainer)
        if enabled_bits(pl_module):
            self._grouped(trainer, pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
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
        begin = self.start / trainer.max_epochs if trainer.max_epochs and trainer.max_epochs > 0 else 0.0
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
        plan = plan_in_force(trainer)
        missing = [s.name for s in plan.sites if s.omega is None] if plan is not None else ["every site"]
        if plan is None or missing:
            raise HawqError(
                f"order={self.by!r} sorts by Omega, which the plan lacks for {', '.join(missing[:3])}: let HAWQ "
                "measure, or give a plan that it measured."
            )
        layers = quantized_layers(pl_module)
        ranked = sorted(plan.sites, key=lambda s: (s.omega or 0.0, s.name), reverse=self.by == "omega")
        count = min(self.stages or len(ranked), len(ranked))
        bounds = [round(i * len(ranked) / count) for i in range(count + 1)]
        return [[q for s in ranked[a:b] for q in _quantizers_of(s, layers)] for a, b in itertools.pairwise(bounds)]


def plan_in_force(trainer: Trainer) -> Plan | None:
    """The plan of the callback that installed one."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        plan = getattr(callback, "plan", None)
        if isinstance(plan, Plan):
            return plan
    return None


def _quantizers_of(site: PlanSite, layers: Any) -> list[Quantizer]:
    mine = [layers[name] for name in site.layers if name in layers]
    return [m.weight_quantizer if site.kind == "weight" else m.input_quantizer for m in mine]
