"""What plans change in the outputs, measured on data that no forecast has seen; alike on every process."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from hawq_lightning._candidates import Candidates
from hawq_lightning._config import MeasureConfig, QuantizerConfig
from hawq_lightning._plan import Plan
from hawq_lightning._site_table import SiteTable
from hawq_lightning._types import LossFn
from hawq_lightning.callbacks._trainer import held_out_batches, without_skipped
from hawq_lightning.quantization import (
    After,
    FloatDistance,
    Forecast,
    Mode,
    PlanLoss,
    QuantizerSpec,
    distance_of_plan,
    forecast,
    loss_per_site,
    norms_with_statistics,
    quantizer_of,
)
from hawq_lightning.quantization.post_training import reestimate_batchnorm
from hawq_lightning.selection import (
    PASSES,
    MeasuredPlan,
    Outlook,
    PlanFrontier,
    Problem,
    hold_against,
    look_ahead,
    omega_table,
)
from hawq_lightning.sensitivity import OnDevice


class HeldOut:
    """Held-out data, and what is left of the others to forecast on.

    Args:
        trainer: whose data they are.
        pl_module: its module, with quantizers off.
        batches: what traces were measured on.
        loss_fn: of a batch.
        config: images, seed, how samples are counted.

    Attributes:
        what: the data to judge on, in words.
        target: the distance to the float network on them.
    """

    def __init__(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batches: OnDevice,
        loss_fn: LossFn,
        config: MeasureConfig,
    ) -> None:
        self._trainer, self._module, self._loss_fn, self._config = trainer, pl_module, loss_fn, config
        self._trained = batches
        self._seen: dict[tuple[str, tuple[int, ...]], PlanLoss] = {}
        draw = partial(held_out_batches, trainer, pl_module, config, batches)
        try:
            self._judge_on(draw())
        except Exception as error:  # whatever a step makes of batches of another kind
            if "validation" not in self.what:
                raise
            rank_zero_info(f"HAWQ: plans are judged on train data: training_step takes no validation batch ({error}).")
            self._judge_on(draw(validation=False))

    def _judge_on(self, drawn: tuple[OnDevice, OnDevice, str]) -> None:
        batches, self._rest, self.what = drawn
        self._batches = without_skipped(self._module, batches, self._loss_fn, self._config)
        self.target = FloatDistance(self._module, self._batches, self._loss_fn)

    @property
    def samples(self) -> int:
        """Of the data to judge on."""
        return sum(self._batches.samples(self._config.samples))

    @property
    def _to_settle(self) -> OnDevice:
        """Train data, of which those that plans are judged on are no part."""
        return self._trained if "validation" in self.what else self._rest

    @property
    def has_norms(self) -> bool:
        """Whether measuring BatchNorm statistics again changes anything."""
        return bool(norms_with_statistics(self._module))

    def forecast(self, table: SiteTable, candidates: Candidates, mode: Mode, after: After, progress: bool) -> Forecast:
        """What plans will cost, from the data that are not held out.

        Args:
            table: the sites.
            candidates: that were weighed.
            mode: ``fast`` or ``accurate``.
            after: of which network.
            progress: show a bar.
        """
        made = forecast(
            self._module, self._rest, self._loss_fn, table, candidates, mode=mode, after=after,
            statistics=self._to_settle, batch_size_fn=self._config.samples, progress=progress,
        )  # fmt: skip
        if self._trainer.world_size > 1:  # sums of one processor may differ from another's in the last digit
            made = self._trainer.strategy.broadcast(made)
        return made

    @contextmanager
    def measured(
        self, table: SiteTable, quantizer: QuantizerConfig, after: After
    ) -> Iterator[Callable[[Plan], PlanLoss]]:
        """Inside, a function from a plan to what it changes; a plan that was seen is not measured again.

        Args:
            table: the sites.
            quantizer: the layers'.
            after: of which network.
        """
        settle = None
        if after != "quantizing" and self.has_norms:
            settle = partial(reestimate_batchnorm, batches=self._to_settle, forward=self._loss_fn)
        with distance_of_plan(
            self._module, self._batches, self.target, settle=settle, batch_size_fn=self._config.samples,
            quantizer=quantizer_of(quantizer), attention=quantizer.attention,
            results=[n for s in table for n in s.layers],
        ) as distance:  # fmt: skip

            def of(plan: Plan) -> PlanLoss:
                key = after, tuple(s.bits for s in plan.sites)
                if key in self._seen:
                    return self._seen[key]
                named = plan.replace(quantizer=quantizer.name, quantizer_options=dict(quantizer.options))
                loss = distance(named)
                if self._trainer.world_size > 1:
                    loss = self._trainer.strategy.broadcast(loss)
                self._seen[key] = loss
                return loss

            yield of

    def loss_per_site(
        self, table: SiteTable, candidates: Candidates, quantizer: QuantizerSpec, progress: bool
    ) -> list[dict[str, str | float]]:
        """Every site alone, at every width: change of the labelled loss, and distance to the float network.

        Args:
            table: the sites.
            candidates: that were weighed.
            quantizer: the layers'.
            progress: show bars.
        """
        return loss_per_site(
            self._module, self._batches, self._loss_fn, table, candidates, quantizer=quantizer,
            batch_size_fn=self._config.samples, progress=progress, target=self.target,
        )  # fmt: skip

    def outlook(
        self,
        table: SiteTable,
        candidates: Candidates,
        problem: Problem,
        front: PlanFrontier | None,
        quantizer: QuantizerConfig,
        mode: Mode,
        stages: Sequence[After],
        progress: bool,
    ) -> Outlook:
        """Forecasts, held against a few plans that are measured: ten passes over the held-out data at the most.

        Args:
            table: the sites.
            candidates: that were weighed.
            problem: of them.
            front: its frontier, if it has one.
            quantizer: the layers'.
            mode: ``fast`` or ``accurate``.
            stages: of which networks; what BatchNorm does not change is asked once.
            progress: show bars.
        """
        asked: Sequence[After] = stages if self.has_norms else ("quantizing",)
        forecasts: dict[After, Forecast] = {}
        rows: list[MeasuredPlan] = []
        for after in asked:
            made = forecasts[after] = self.forecast(table, candidates, mode, after, progress)
            plans = look_ahead(front, problem, made, PASSES // len(asked))
            with self.measured(table, quantizer, after) as measured:
                rows += hold_against(plans, made, measured)
        omega = omega_table(problem) if problem.sensitivity is not None else {}
        return Outlook(forecasts, omega, tuple(rows), self.samples, self.what)
