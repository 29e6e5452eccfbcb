"""Precision adjusted through training: traces measured again, a budget that narrows, bits that move if it pays."""

from __future__ import annotations

from dataclasses import replace

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from hawq_lightning._config import whole
from hawq_lightning._errors import HawqError
from hawq_lightning._plan import Plan
from hawq_lightning._types import StateDict
from hawq_lightning.callbacks._hawq import HAWQ
from hawq_lightning.callbacks._schedule_time import ScheduleTime
from hawq_lightning.quantization import enabled_bits
from hawq_lightning.selection import Problem, problem_of, recost, select


class AdjustPrecision(Callback):
    """Beside :class:`HAWQ`: choose bits anew every few epochs, on the network as training has made it by then.

    The first plan is HAWQ's, of its own budget, which is to be ``"4x"`` or the like. Every ``every`` epochs traces are
    measured on the weights as they are (quantizers paused), the budget narrows geometrically to ``end``, and bits are
    chosen; a site's present width counts as if its score were less by the share ``hysteresis``, so that noise of the
    traces moves none. Quantizers are fitted anew; parameters, optimizer and its state stay.

    Args:
        end: how many times smaller than float32 the weights are in the end.
        every: epochs between two measurements.
        until: when ``end`` is reached: a share of the training, or an epoch.
        hysteresis: 0: bits follow every measurement; 0.2: a width that is there may be a quarter worse.

    Attributes:
        history: one dict a measurement: epoch, budget, how many sites moved, their number.

    Raises:
        HawqError: a setting out of range; at the start of ``fit``: no HAWQ, a budget of it that is not of weights such
            as ``"4x"``, no known end of training, or no measurement once ``end`` is due.
    """

    def __init__(self, end: float, every: int = 1, until: int | float | str = 0.7, hysteresis: float = 0.1) -> None:
        if isinstance(end, bool) or not isinstance(end, (int, float)) or not 1 <= end <= 32:
            raise HawqError(f"end is {end!r}; it is how many times smaller the weights are in the end, such as 12.")
        if isinstance(hysteresis, bool) or not isinstance(hysteresis, (int, float)) or not 0 <= hysteresis < 1:
            raise HawqError(f"hysteresis is {hysteresis!r}; it is a share, 0 or more and less than 1.")
        self.end, self.hysteresis = float(end), float(hysteresis)
        self.every = whole("every", every, 1)
        self.until = ScheduleTime(until, "AdjustPrecision", "until")
        self.history: list[dict[str, float]] = []

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check the settings against HAWQ and the Trainer."""
        self.until.check(trainer)
        self._start(self._hawq(trainer))
        if trainer.max_epochs is None or trainer.max_epochs < 1:
            raise HawqError("AdjustPrecision needs max_epochs: the budget narrows over the training.")
        first, last = self._hawq(trainer).start_epoch, self._last(trainer)
        if not any(epoch >= last for epoch in range(first + self.every, trainer.max_epochs, self.every)):
            raise HawqError(
                f"AdjustPrecision(every={self.every}) measures in no epoch from {last} on, of {trainer.max_epochs}: "
                f"{self.end:g}x would not be reached. Make every or until less."
            )

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure and choose anew, where it is time."""
        hawq = self._hawq(trainer)
        since = trainer.current_epoch - hawq.start_epoch
        if since < 1 or since % self.every or not enabled_bits(pl_module):
            return
        budget = self.budget_at(trainer, hawq)
        if self.history and self.history[-1]["budget"] >= self.end:
            return  # what is left of the training is fine-tuning
        old = hawq.plan
        measured, chosen_by = hawq.measure_callback, hawq.measure_callback.select
        measured.select = replace(chosen_by, budget=f"{budget:.6g}x")
        try:
            fresh = measured.analyze(trainer, pl_module)
        finally:
            measured.select = chosen_by
        plan = self._kept(fresh, old, f"{budget:.6g}x")
        moved = sum(old.bits.get(name) != bits for name, bits in plan.bits.items())
        self.history.append({
            "epoch": trainer.current_epoch, "budget": budget, "moved": moved, "sites": len(plan.bits),
        })  # fmt: skip
        rank_zero_info(f"HAWQ: epoch {trainer.current_epoch}, {budget:.3g}x: bits of {moved} sites moved.")
        if trainer.is_global_zero:
            plan.save(measured.folder(trainer) / "plan.json")
        hawq.change_plan(trainer, pl_module, plan)

    def budget_at(self, trainer: Trainer, hawq: HAWQ) -> float:
        """How many times smaller the weights are to be from this epoch on."""
        start, last = self._start(hawq), self._last(trainer)
        since, span = trainer.current_epoch - hawq.start_epoch, last - hawq.start_epoch
        share = 1.0 if span <= 0 else min(1.0, since / span)
        return float(start * (self.end / start) ** share)

    def state_dict(self) -> StateDict:
        """What was measured so far."""
        return {"history": self.history}

    def load_state_dict(self, state_dict: StateDict) -> None:
        """See :meth:`state_dict`."""
        self.history = list(state_dict.get("history", []))

    def _kept(self, fresh: Plan, old: Plan, budget: str) -> Plan:
        """The fresh measurement's plan with the widths of the old one where these are about as good."""
        problem = problem_of(fresh)
        held = {
            name: tuple(
                replace(c, omega=c.omega * (1 - self.hysteresis)) if c.bits == old.bits.get(name) else c for c in listed
            )
            for name, listed in problem.candidates.items()
        }
        kept = select(Problem(problem.table, held, problem.sensitivity, problem.file_overhead), budget)
        sites = tuple(replace(s, bits=kept.bits[s.name]) for s in fresh.sites)
        return recost(fresh.replace(sites=sites).reconciled(), problem)

    def _last(self, trainer: Trainer) -> int:
        assert trainer.max_epochs is not None
        return max(1, round(self.until.as_share(trainer) * trainer.max_epochs))

    @staticmethod
    def _start(hawq: HAWQ) -> float:
        budget = hawq.measure_callback.select.budget
        text = budget.get("weights", "") if isinstance(budget, dict) and len(budget) == 1 else budget
        try:
            if isinstance(text, str) and text.endswith("x"):
                return float(text[:-1])
        except ValueError:
            pass
        raise HawqError(f'AdjustPrecision narrows a budget of weights such as "4x"; that of HAWQ is {budget!r}.')

    @staticmethod
    def _hawq(trainer: Trainer) -> HAWQ:
        listed = trainer.callbacks  # type: ignore[attr-defined]
        for callback in listed:
            if isinstance(callback, HAWQ):
                return callback
        raise HawqError("AdjustPrecision works beside HAWQ: put HAWQ into the Trainer's callbacks.")
