"""From a problem to a plan, with what its selector and its budget need beside traces."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from hawq_lightning._candidates import Candidates
from hawq_lightning._config import MeasureConfig, QuantizerConfig, SelectConfig
from hawq_lightning._errors import HawqError
from hawq_lightning._plan import Plan
from hawq_lightning._site_table import SiteTable
from hawq_lightning._types import LossFn
from hawq_lightning.callbacks._held_out import HeldOut
from hawq_lightning.callbacks._trainer import shard_of
from hawq_lightning.quantization import After, loss_of_plan, quantizer_of
from hawq_lightning.selection import (
    SELECTORS,
    Outlook,
    PlanFrontier,
    Problem,
    loss_budget,
    select,
    select_by_loss,
)
from hawq_lightning.sensitivity import OnDevice, top_eigenvalues


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
        outlook: what plans are expected to cost, where somebody asked for that.
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
    outlook: Outlook | None = None

    @property
    def seed(self) -> int:
        """Of random selectors."""
        return self.measure.seed if self.select.seed is None else self.select.seed

    @cached_property
    def held_out(self) -> HeldOut:
        """The data that plans are judged on."""
        return HeldOut(self.trainer, self.pl_module, self.batches, self.loss_fn, self.measure)

    def look_ahead(self, problem: Problem, front: PlanFrontier | None) -> None:
        """Forecast what plans will cost, if the settings ask for it or the budget is by loss.

        Args:
            problem: to choose from.
            front: its frontier, if it has one.
        """
        budget, mode = loss_budget(self.select.budget), self.measure.forecast
        if mode is None and budget is None:
            return
        stages: tuple[After, ...] = ("quantizing", "batchnorm")
        if mode is None and budget is not None:
            stages = (budget.after,)
        try:
            self.outlook = self.held_out.outlook(
                self.table, self.candidates, problem, front, self.quantizer, mode or "fast", stages, self.progress
            )
        except HawqError as error:
            if budget is not None:
                raise
            rank_zero_info(f"HAWQ: what plans will cost cannot be forecast here: {error}")

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
        assert self.outlook is not None
        held_out, expected = self.held_out, partial(self.outlook.of, after=budget.after)
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
