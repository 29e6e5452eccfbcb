"""From a problem to a plan, with what its selector and its budget need beside traces."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

from lightning.pytorch import LightningModule, Trainer

from hawq_lightning._candidates import Candidates
from hawq_lightning._config import MeasureConfig, QuantizerConfig, SelectConfig
from hawq_lightning._errors import HawqError
from hawq_lightning._plan import Plan
from hawq_lightning._site_table import SiteTable
from hawq_lightning._types import LossFn
from hawq_lightning.callbacks._held_out import HeldOut
from hawq_lightning.callbacks._trainer import shard_of
from hawq_lightning.quantization import PlanLoss, loss_of_plan, quantizer_of
from hawq_lightning.selection import SELECTORS, Problem, loss_budget, select, select_by_loss
from hawq_lightning.sensitivity import OnDevice, top_eigenvalues

_CHANGED = 0.2  # of the root of the KL: a first guess of the share of changed predictions, corrected by measuring


@dataclass
class Choice:
    """Chooses a plan of a problem, alike on every process.

    Attributes:
        trainer: whose processes choose together.
        pl_module: with quantizers off.
        batches: what traces were measured on.
        loss_fn: of a batch.
        quantizer: the layers'.
        measure: images, seed and accuracy of what is measured.
        select: budget, selector, and what goes with it.
        table: the sites.
        candidates: that were weighed.
        progress: show bars.
        eigenvalues: top ones of the Hessian by site, where the selector asked for them.
    """

    trainer: Trainer
    pl_module: LightningModule
    batches: OnDevice
    loss_fn: LossFn
    quantizer: QuantizerConfig
    measure: MeasureConfig
    select: SelectConfig
    table: SiteTable
    candidates: Candidates
    progress: bool
    eigenvalues: Mapping[str, float] | None = None

    @property
    def seed(self) -> int:
        """Of random selectors."""
        return self.measure.seed if self.select.seed is None else self.select.seed

    def plan_of(self, problem: Problem) -> Plan:
        """The plan.

        Raises:
            HawqError: no plan keeps the budget, or what the selector needs cannot be had.
        """
        config, needs = self.select, SELECTORS[self.select.selector].needs
        if "eigenvalues" in needs:
            self._measure_eigenvalues(problem)
        if loss_budget(config.budget) is not None:
            chosen = self._by_loss(problem)
        else:
            pick = partial(select, problem, config.budget, config.selector, seed=self.seed, bits=config.bits)
            pick = partial(pick, trials=config.trials)
            chosen = self._by_measured_loss(pick) if "loss" in needs else pick(eigenvalues=self.eigenvalues)
        if self.eigenvalues is not None:
            chosen = chosen.replace(settings={**chosen.settings, "eigenvalues": self.eigenvalues})
        return with_quantizer_named(chosen, self.quantizer)

    def _measure_eigenvalues(self, problem: Problem) -> None:
        names = [s.name for s in problem.sites if len({c.bits for c in problem.candidates[s.name]}) > 1]
        eigenvalues = top_eigenvalues(
            self.pl_module, self.batches, self.loss_fn, sites=self.table, only=names, rtol=self.measure.rtol,
            seed=self.measure.seed, progress=self.progress, shard=shard_of(self.trainer),
        )  # fmt: skip
        if wrong := [n for n, v in eigenvalues.items() if not math.isfinite(v)]:
            raise HawqError(f"The top eigenvalue of site {wrong[0]!r} is not a finite number; exclude the site.")
        self.eigenvalues = {n: max(0.0, v) for n, v in eigenvalues.items()}

    def _by_measured_loss(self, pick: Callable[..., Plan]) -> Plan:
        names = [n for s in self.table for n in s.layers]
        with loss_of_plan(
            self.pl_module, self.batches, self.loss_fn, quantizer=quantizer_of(self.quantizer),
            attention=self.quantizer.attention, results=names,
        ) as measure_loss:  # fmt: skip
            return pick(measure_loss=lambda plan: measure_loss(with_quantizer_named(plan, self.quantizer)))

    def _by_loss(self, problem: Problem) -> Plan:
        budget = loss_budget(self.select.budget)
        assert budget is not None
        held_out = HeldOut(self.trainer, self.pl_module, self.batches, self.loss_fn, self.measure)
        made = held_out.forecast(self.table, self.candidates, "accurate", budget.after, self.progress)

        def expected(bits: Mapping[str, int]) -> PlanLoss:
            kl = made.of(bits)
            return PlanLoss(kl, _CHANGED * math.sqrt(max(kl, 0.0)) if held_out.target.classifies else None)

        with held_out.measured(self.table, self.quantizer, budget.after) as measured:
            plan = select_by_loss(
                problem, self.select.budget, measured, expected, self.select.selector, seed=self.seed,
                eigenvalues=self.eigenvalues,
            )  # fmt: skip
        by_loss = {**plan.settings["by_loss"], "measured_on": held_out.what}
        return plan.replace(settings={**plan.settings, "by_loss": by_loss})


def with_quantizer_named(plan: Plan, quantizer: QuantizerConfig) -> Plan:
    """The plan, for this quantizer."""
    return plan.replace(quantizer=quantizer.name, quantizer_options=dict(quantizer.options))
