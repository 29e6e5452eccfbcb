"""The callback that measures and logs traces and picks a plan. It changes nothing in the model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from hawq_lightning._config import MeasureConfig, QuantizerConfig, SelectConfig, check_bits
from hawq_lightning._errors import HawqError
from hawq_lightning._io import check_folder, write_text
from hawq_lightning._plan import Plan
from hawq_lightning._stays_float import stays_float
from hawq_lightning._types import Batch, JsonObject, LossFn
from hawq_lightning.callbacks._announce import announce, warn_of_float, warn_of_no_codes
from hawq_lightning.callbacks._choose import Choice
from hawq_lightning.callbacks._exact_types import check_exact_types
from hawq_lightning.callbacks._feasible import check_covers, preview, warn_untrained
from hawq_lightning.callbacks._loss_check import check_csv, check_of_sites
from hawq_lightning.callbacks._results import HasResults, Results, there
from hawq_lightning.callbacks._shared import shared_traces
from hawq_lightning.callbacks._trainer import (
    check_trainer,
    is_sharded,
    loss_from_training_step,
    refuse_sharded,
    shard_of,
    shows_progress,
    train_batches,
    trained_by,
)
from hawq_lightning.callbacks.fault_tolerance import interruptible
from hawq_lightning.quantization import (
    candidates,
    fake_quant_disabled,
    rounding_errors,
)
from hawq_lightning.selection import (
    SCORES,
    SELECTORS,
    Outlook,
    PlanFrontier,
    Problem,
    StablePlan,
    constraints_of,
    loss_budget,
    plan_frontier,
    with_bootstrap_stability,
)
from hawq_lightning.sensitivity import Sensitivity, guarded_mean_traces, measure, pages_kept


class MeasureTraces(HasResults, Callback):
    """Measure the Hessian traces of every site on the Trainer's own train data and pick a plan, before fitting.

    It changes nothing in the model.

    Args:
        quantizer: which layers, whose rounding errors are weighed, and the widths to choose from; a registered name
            will do.
        measure: how traces are measured.
        select: how bits are chosen.
        sensitivity: an earlier measurement, or its file, instead of a new one.
        dirpath: folder of ``sensitivity.json``, ``frontier.csv`` and ``plan.json``; ``None``: the logger's.
        progress: show bars where the Trainer does.

    Attributes:
        sites, sensitivity, frontier, plan: once fitting has started; before that they raise HawqError.
        candidates: site -> bit-widths that were weighed.
        loss_per_site: predicted and measured loss changes, with ``MeasureConfig(loss_per_site=True)``.
        outlook: what plans are expected to cost, with ``MeasureConfig(forecast=...)`` or a budget by loss.

    Raises:
        HawqError: a file that is no sensitivity, or settings that contradict each other; at the start of ``fit``:
            whatever cannot be measured, or a budget that no plan meets.
    """

    only_needed = False  # HAWQ measures no traces for selectors that read none
    stability_draws = 40  # bootstraps over images behind each site's ``stability``

    def __init__(
        self,
        quantizer: str | QuantizerConfig = "uniform",
        measure: MeasureConfig | None = None,
        select: SelectConfig | None = None,
        sensitivity: Sensitivity | str | Path | None = None,
        dirpath: str | Path | None = None,
        progress: bool = True,
    ) -> None:
        self.quantizer = QuantizerConfig(quantizer) if isinstance(quantizer, str) else quantizer
        self.measure, self.select = measure or MeasureConfig(), select or SelectConfig()
        self._selector = SELECTORS[self.select.selector]
        if self.measure.stop_when == "stable_plan" and "stable_plan" not in self._selector.offers:
            able = " or ".join(n for n in SELECTORS if "stable_plan" in SELECTORS[n].offers)
            raise HawqError(
                f"stop_when='stable_plan' selects again and again, by {able}; not by {self.select.selector!r}."
            )
        if self.measure.stop_when == "stable_plan" and loss_budget(self.select.budget) is not None:
            raise HawqError(
                "stop_when='stable_plan' selects again and again, which a budget by loss is too costly for."
            )
        if self.measure.stop_when == "stable_plan" and "quadratic_forms" in SCORES[self.select.score].needs:
            raise HawqError(f"stop_when='stable_plan' redraws traces, which score={self.select.score!r} does not read.")
        self.given = Sensitivity.load(sensitivity) if isinstance(sensitivity, (str, Path)) else sensitivity
        self.dirpath, self.progress = dirpath, progress
        self.results = Results()
        self.eigenvalues: dict[str, float] = {}
        self._types_checked = False
        self._plan: Plan | None = None

    @property
    def has_plan(self) -> bool:
        """Whether a plan was chosen here."""
        return self._plan is not None

    @property
    def plan(self) -> Plan:
        """The plan that was chosen."""
        return there(self._plan, "plan")

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure and select; what was measured before on the same weights and data is taken from its file."""
        self.analyze(trainer, pl_module)

    def folder(self, trainer: Trainer) -> Path:
        """Where results go; the same on every process."""
        return Path(self.dirpath or trainer.log_dir or trainer.default_root_dir)

    def analyze(self, trainer: Trainer, pl_module: LightningModule) -> Plan:
        """Traces, options, frontier, plan; everything is saved as soon as it is known.

        Raises:
            HawqError: whatever cannot be measured or met, before any training step.
        """
        check_trainer(trainer)
        refuse_sharded(trainer)
        return interruptible(trainer, lambda check: self._analyze(trainer, pl_module, check))

    def check_feasible_early(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse before a training what can be told without one: no sites, unmet budget or bits, traces of others."""
        if is_sharded(trainer):
            return

        def look(check: Callable[[], None]) -> None:
            with (
                fake_quant_disabled(pl_module),
                loss_from_training_step(trainer, pl_module, self.measure.loss_fn, check) as loss_fn,
            ):
                batches = train_batches(trainer, pl_module, self.measure, 1, loss_fn)
                self._check_types(pl_module, batches[0], loss_fn)
                trained = trained_by(trainer, pl_module)
                table, _ = preview(
                    self.quantizer, self.select, pl_module, batches[0], loss_fn, trained=trained,
                    size_of=self.measure.samples,
                )  # fmt: skip
                if self.given is not None:
                    check_covers(self.given, table)

        interruptible(trainer, look)

    def _analyze(self, trainer: Trainer, pl_module: LightningModule, check: Callable[[], None]) -> Plan:
        folder, config = self.folder(trainer), self.measure
        show = self.progress and shows_progress(trainer)
        with (
            pages_kept(),
            fake_quant_disabled(pl_module),
            loss_from_training_step(trainer, pl_module, config.loss_fn, check) as loss_fn,
        ):
            batches = train_batches(trainer, pl_module, config, config.images, loss_fn)
            self._check_types(pl_module, batches[0], loss_fn)
            trained = trained_by(trainer, pl_module)
            table, nominal = preview(
                self.quantizer, self.select, pl_module, batches[0], loss_fn, later=batches[1:],
                trained=trained, size_of=config.samples,
            )  # fmt: skip
            self.results.sites, overhead = table, nominal.file_overhead
            warn_of_float(table)
            if self.quantizer.deploy == "integer":
                warn_of_no_codes(table)
            if trainer.is_global_zero:
                check_folder(folder)
            constraints = {**constraints_of(self.select), "steps": tuple(nominal.steps)}
            images = sum(batches.samples(config.samples))
            with shared_traces(trainer, folder, config.cache, table, images) as traces:
                weigh = partial(
                    candidates, pl_module, batches, sites=table, loss_fn=loss_fn, config=self.quantizer,
                )  # fmt: skip
                stable = StablePlan(
                    table, weigh, self.select.budget, self.select.selector, overhead, constraints, self._question
                )
                sensitivity = self.given
                if sensitivity is None and not self.without_traces:
                    rounding = None
                    if self._measures_forms:
                        rounding = rounding_errors(pl_module, weigh(None, progress=show), table, batches, loss_fn)
                    sensitivity = measure(
                        pl_module, batches, loss_fn, config=config, sites=table, progress=show,
                        shard=shard_of(trainer), reuse=traces.find, resume=traces.partial,
                        stop=stable if config.stop_when == "stable_plan" else None, rounding=rounding,
                    )  # fmt: skip
                    traces.store(sensitivity)
            if sensitivity is not None:
                # as the file tells it: a run that takes it from there chooses by the same digits
                sensitivity = self.results.sensitivity = Sensitivity.from_dict(sensitivity.to_dict())
                check_covers(sensitivity, table)
                if trainer.is_global_zero:
                    sensitivity.save(folder / "sensitivity.json")
                traces.forget_partial(sensitivity.fingerprint)
            choices = self.results.candidates = weigh(sensitivity, progress=show)
            problem = Problem(table, choices, sensitivity, overhead, **constraints)
            if sensitivity is None:
                self.results.no_traces()
            front = None if sensitivity is None else self._frontier_of(problem)
            choice = Choice(
                trainer, pl_module, batches, loss_fn, self.quantizer, config, self.select, table, choices, show,
            )  # fmt: skip
            choice.look_ahead(problem, front)
            self.results.outlook = choice.outlook
            plan = self._plan = self._choose(trainer, choice, problem)
            if trainer.is_global_zero:
                plan.save(folder / "plan.json")
                save_frontier(folder, front, choice.outlook)
            if sensitivity is not None:
                warn_untrained(sensitivity, pl_module, batches, loss_fn, plan)
            if config.loss_per_site:
                losses = self.results.loss_per_site = check_of_sites(choice)
                if trainer.is_global_zero:
                    write_text(folder / "loss_check.csv", check_csv(losses))
        announce(trainer, sensitivity, plan)
        return plan

    def _check_types(self, pl_module: LightningModule, batch: Batch, loss_fn: LossFn) -> None:
        """Once: quantizers change nothing in what code asks of types."""
        if not self._types_checked:
            self._types_checked = True
            check_exact_types(pl_module, batch, loss_fn)

    def _choose(self, trainer: Trainer, choice: Choice, problem: Problem) -> Plan:
        """The plan, the same on every process, with what it came from."""
        chosen = choice.plan_of(problem)
        self.eigenvalues = dict(choice.eigenvalues or {})
        if "bootstrap" in self._selector.offers and self.stability_draws:
            chosen = with_bootstrap_stability(problem, chosen, bootstraps=self.stability_draws)
        sensitivity = self.results.sensitivity
        if sensitivity is None:
            chosen = _without_omega(chosen)
            of_traces: JsonObject = {"traces": "none were measured: the selector reads none"}
        else:
            floored = list(guarded_mean_traces(sensitivity)[1])
            of_traces = {**sensitivity.settings, "lifted": floored}
        settings = {**chosen.settings, **of_traces, "seed": self.measure.seed}
        if sentence := stays_float(self.sites):
            settings["stays_float"] = sentence
        chosen = chosen.replace(settings=settings, fingerprint="" if sensitivity is None else sensitivity.fingerprint)
        return Plan.from_dict(trainer.strategy.broadcast(chosen.to_dict()))

    def _frontier_of(self, problem: Problem) -> PlanFrontier | None:
        try:
            self.results.frontier = frontier = plan_frontier(problem)
        except HawqError as error:  # ties and device pairs may couple too much for it, not for the plan
            self.results.frontier, self.results.no_frontier = None, str(error)
            rank_zero_info(f"HAWQ: there is no frontier.csv: {error}")
            return None
        return frontier

    @property
    def without_traces(self) -> bool:
        """Whether no traces are measured, since nothing reads them."""
        reads_none = "without_traces" in self._selector.offers and "traces" not in SCORES[self.select.score].needs
        reads_none = reads_none and not (self.measure.loss_per_site or self._measures_forms)
        return self.only_needed and reads_none and self.given is None

    @property
    def _measures_forms(self) -> bool:
        return self.measure.quadratic_forms or "quadratic_forms" in SCORES[self.select.score].needs

    @property
    def _question(self) -> str:
        """What the candidates depend on beside budget and constraints; it goes into fingerprints, so its form stays."""
        q = self.quantizer
        widths = check_bits(q.weight_bits, "weight")
        others = None if q.activation_bits is None else check_bits(q.activation_bits, "activation")
        attention = " attention" if q.attention else ""
        attention += " integer" if q.deploy == "integer" else ""
        return f"{widths} {others} {q.input_bits} {q.code_format} {q.name} {dict(q.options)}{attention}"


def save_frontier(folder: Path, front: PlanFrontier | None, outlook: Outlook | None) -> None:
    """Write ``frontier.csv`` and, where there is an outlook, ``forecast.json``.

    Args:
        folder: of the run.
        front: ``None``: there is none.
        outlook: whose expectations are columns of the frontier.
    """
    if front is not None:
        front.to_csv(folder / "frontier.csv", more=None if outlook is None else outlook.columns)
    if outlook is not None:
        outlook.save(folder / "forecast.json")


def _without_omega(plan: Plan) -> Plan:
    """A plan that no traces led to: what stands for Ω in it is the perturbation alone."""
    return plan.replace(sites=tuple(replace(s, omega=None) for s in plan.sites))
