"""The callback that measures and logs traces and picks a plan. It changes nothing in the model."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from inspect import Parameter, signature
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from hawq_lightning._errors import HawqError, nearest
from hawq_lightning._io import read_json, write_text
from hawq_lightning._plan import Candidate, Plan
from hawq_lightning._site_table import SiteTable
from hawq_lightning._sites import Patterns
from hawq_lightning.callbacks._feasible import check_covers, preview, warn_untrained
from hawq_lightning.callbacks._shared import shared_traces
from hawq_lightning.callbacks._trainer import (
    check_namespace,
    draw_batches,
    is_sharded,
    loss_from_training_step,
    onto_device,
    refuse_sharded,
    shard_of,
    shows_progress,
)
from hawq_lightning.callbacks.fault_tolerance import interruptible
from hawq_lightning.quantization import (
    QuantizerSpec,
    candidates,
    check_bits,
    fake_quant_disabled,
    loss_of_plan,
    loss_per_site,
    quantizer_named,
    weight_code_formats,
)
from hawq_lightning.selection import (
    SELECTORS,
    Frontier,
    LatencyTable,
    Problem,
    StablePlan,
    plan_frontier,
    read_budget,
    select,
    tables_of_budget,
    with_bootstrap_stability,
)
from hawq_lightning.sensitivity import (
    ESTIMATORS,
    L1,
    Sensitivity,
    check_draw,
    check_precision,
    guarded_mean_traces,
    measure,
    top_eigenvalues,
)

STOPS = ("error", "plan")
CONSTRAINTS = tuple(p.name for p in signature(Problem).parameters.values() if p.kind is Parameter.KEYWORD_ONLY)


class MeasureTraces(Callback):
    """Measure the Hessian traces of every site on the Trainer's own train data and pick a plan, before fitting.

    Args:
        weight_bits: widths that weights may take, 1 to 8.
        activation_bits: likewise 2 to 8; ``None`` leaves activations float.
        budget: ``"8x"``, ``"3.5bit"``, ``"8MB"``, ``"8MiB"``, ``{"bops": "50%"}``, ``{"act": "7.6x"}`` or several.
        selector: rule of choice, see :data:`hawq_lightning.selection.SELECTORS`.
        constraints: keywords of :class:`hawq_lightning.selection.Problem`: ``ties``, ``fixed``, ``min_bits`` ...
        bits: for ``selector="manual"``: site or glob -> bits, or a file of them.
        latency: CSV of milliseconds a layer and width, as ``hawq-lightning-export`` writes it; for a latency budget.
        estimator: ``auto``, ``ggn``, ``hessian``, ``hutchinson`` or ``exact``.
        l1: what L1 losses, which have no curvature, count as: ``fisher`` or ``zero`` (:func:`hawq_lightning.measure`).
        images: how many train images to measure on.
        rtol: standard error to reach, as a share of each trace.
        max_probes: random vectors a batch at the most.
        draw: images that a round sends back: ``auto``, ``all``, or ``curvature``: see :func:`hawq_lightning.measure`.
        stop: ``error``, when ``rtol`` is reached; ``plan``, also before, as soon as 95% of bootstraps over the images
            agree that the plan is within 1% of their best: see :class:`hawq_lightning.selection.StablePlan`.
        precision: of the passes that measure: ``float32``, or ``bf16`` where a probe agrees with float32 within 5%.
        sensitivity: an earlier measurement, or its file, instead of a new one.
        include: glob on layer names, layer type, or ``f(name, module) -> bool``.
        exclude: likewise; the module's own ``quantization_exclude`` is added.
        loss_fn: ``loss_fn(module, batch) -> scalar`` instead of ``training_step``.
        input_bits: width of what the network itself reads; ``None``: as other activations.
        codes: weights of 2 bits and more: ``auto``, ``affine`` or ``midrise``.
        quantizer: registered name: whose errors are weighed.
        quantizer_options: keywords of the quantizer, such as ``{"ranges": "percentile"}``.
        check_loss: also measure the loss change of every site and width (``loss_check.csv``).
        seed: of all draws.
        selection_seed: of random selectors; default: ``seed``.
        cache: folder of measurements that runs share: the same weights, data and settings are measured once.
        dirpath: where ``sensitivity.json``, ``frontier.csv`` and ``plan.json`` go; default: the logger's folder.
        progress: show bars where the Trainer does.

    Attributes:
        sites, sensitivity, options, frontier, plan, loss_check: filled when fitting starts.
    """

    stability_draws = 40  # bootstraps over images behind each site's ``stability``

    def __init__(
        self,
        weight_bits: int | Sequence[int] = (2, 4, 8),
        activation_bits: int | Sequence[int] | None = 8,
        budget: Any = "8x",
        *,
        selector: str = "pareto",
        constraints: Mapping[str, Any] | None = None,
        bits: Mapping[str, int] | str | Path | None = None,
        latency: str | Path | None = None,
        estimator: str = "auto",
        l1: str = "fisher",
        images: int = 512,
        rtol: float = 0.05,
        max_probes: int = 64,
        draw: str = "auto",
        stop: str = "error",
        precision: str = "float32",
        sensitivity: Sensitivity | str | Path | None = None,
        include: Patterns = None,
        exclude: Patterns = None,
        loss_fn: Callable[[Any, Any], torch.Tensor] | None = None,
        input_bits: int | None = 8,
        codes: str = "auto",
        quantizer: str | QuantizerSpec = "uniform",
        quantizer_options: Mapping[str, Any] | None = None,
        check_loss: bool = False,
        seed: int = 0,
        selection_seed: int | None = None,
        cache: str | Path | None = None,
        dirpath: str | Path | None = None,
        progress: bool = True,
    ) -> None:
        self.weight_bits = check_bits(weight_bits, "weight")
        self.activation_bits = None if activation_bits is None else check_bits(activation_bits, "activation")
        self.input_bits = None if input_bits is None else check_bits(input_bits, "activation")[0]
        if estimator not in ESTIMATORS:
            raise HawqError(f"Unknown estimator {estimator!r}; use one of {', '.join(ESTIMATORS)}.")
        for what, least, number in (("images", 1, images), ("max_probes", 1, max_probes)):
            if isinstance(number, bool) or not isinstance(number, int) or number < least:
                raise HawqError(f"{what} is {number!r}; it is a whole number, {least} or more.")
        if not (isinstance(rtol, (int, float)) and 0 < rtol < math.inf):
            raise HawqError(f"rtol is {rtol!r}; it is a share of each trace such as 0.05.")
        weight_code_formats(8, codes)
        self._selector = SELECTORS[selector]
        self._selector.check(budget, bits)
        if isinstance(bits, (str, Path)):
            read_json(bits, "manual plan")
        for key in constraints or {}:
            if key not in CONSTRAINTS:
                known = ", ".join(CONSTRAINTS)
                raise HawqError(f"There is no constraint {key!r}; known are {known}.{nearest(str(key), CONSTRAINTS)}")
        if budget is not None:
            read_budget(budget, (constraints or {}).get("extra_costs") or ())
        self.budget, self.selector, self.constraints, self.bits = budget, selector, dict(constraints or {}), bits
        if latency is not None:
            self.constraints["latency"] = LatencyTable.load(latency)
        tables = {"steps", *(k for k, v in self.constraints.items() if v is not None)}  # the steps are watched
        tables |= set(self.constraints.get("tables") or ())
        for name, message in tables_of_budget(budget, self.constraints.get("extra_costs") or ()).items():
            if name not in tables:
                raise HawqError(message)
        if l1 not in L1:
            raise HawqError(f"Unknown l1 {l1!r}; use 'zero' or 'fisher'.")
        self.l1 = l1
        self.estimator, self.images, self.rtol, self.seed = estimator, images, rtol, seed
        if stop not in STOPS:
            raise HawqError(f"Unknown stop {stop!r}; use one of {', '.join(STOPS)}.{nearest(str(stop), STOPS)}")
        if stop == "plan" and "stable_plan" not in self._selector.offers:
            able = " or ".join(n for n in SELECTORS if "stable_plan" in SELECTORS[n].offers)
            raise HawqError(f"stop='plan' selects again and again, by {able}; not by {selector!r}.")
        self.max_probes, self.stop = max_probes, stop
        self.draw, self.precision = check_draw(draw), check_precision(precision)
        self.selection_seed = seed if selection_seed is None else selection_seed
        self.cache = cache
        self.given = Sensitivity.load(sensitivity) if isinstance(sensitivity, (str, Path)) else sensitivity
        self.include, self.exclude, self.loss_fn, self.codes = include, exclude, loss_fn, codes
        self.quantizer = quantizer_named(quantizer, quantizer_options)
        self.check_loss, self.dirpath, self.progress = check_loss, dirpath, progress
        self.sites: SiteTable | None = None
        self.sensitivity: Sensitivity | None = None
        self.options: Mapping[str, tuple[Candidate, ...]] = {}
        self.frontier: Frontier | None = None
        self.plan: Plan | None = None
        self.loss_check: list[dict[str, Any]] = []
        self.eigenvalues: dict[str, float] = {}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure and select; what was measured before on the same weights and data is taken from its file."""
        self.analyze(trainer, pl_module)

    def excluded(self, pl_module: torch.nn.Module) -> list[Any]:
        """The user's patterns and the module's own."""
        own = tuple(getattr(pl_module, "quantization_exclude", ()) or ())
        if self.exclude is None:
            return [*own]
        listed = isinstance(self.exclude, Sequence) and not isinstance(self.exclude, str)
        return [*own, *(self.exclude if listed else [self.exclude])]  # type: ignore[misc, list-item]

    def folder(self, trainer: Trainer) -> Path:
        """Where results go; the same on every process."""
        return Path(self.dirpath or trainer.log_dir or trainer.default_root_dir)

    def analyze(self, trainer: Trainer, pl_module: LightningModule) -> Plan:
        """Traces, options, frontier, plan; everything is saved as soon as it is known.

        Raises:
            HawqError: whatever cannot be measured or met, before any training step.
        """
        check_namespace(trainer)
        refuse_sharded(trainer)
        return interruptible(trainer, lambda check: self._analyze(trainer, pl_module, check))

    def check_feasible_early(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse before a training what can be told without one: no sites, a budget or bits that no plan meets."""
        if is_sharded(trainer):
            return

        def look(check: Callable[[], None]) -> None:
            with (
                fake_quant_disabled(pl_module),
                loss_from_training_step(trainer, pl_module, self.loss_fn, check) as loss_fn,
            ):
                batches = onto_device(trainer, pl_module, draw_batches(trainer, 1, self.seed))
                preview(self, pl_module, batches[0], loss_fn)

        interruptible(trainer, look)

    def _analyze(self, trainer: Trainer, pl_module: LightningModule, check: Callable[[], None]) -> Plan:
        folder = self.folder(trainer)
        show = self.progress and shows_progress(trainer)
        with (
            fake_quant_disabled(pl_module),
            loss_from_training_step(trainer, pl_module, self.loss_fn, check) as loss_fn,
        ):
            drawn = draw_batches(trainer, self.images, self.seed)
            batches = onto_device(trainer, pl_module, drawn)
            table, nominal = preview(self, pl_module, batches[0], loss_fn)
            self.sites, overhead = table, nominal.file_overhead
            constraints = {**self.constraints, "steps": tuple(nominal.steps)}
            with shared_traces(trainer, folder, self.cache, table) as traces:
                weigh = partial(
                    candidates, pl_module, batches, sites=table, loss_fn=loss_fn, weight_bits=self.weight_bits,
                    activation_bits=self.activation_bits, input_bits=self.input_bits, code_format=self.codes,
                    quantizer=self.quantizer,
                )  # fmt: skip
                stable = StablePlan(table, weigh, self.budget, self.selector, overhead, constraints, self._asked)
                self.sensitivity = self.given or measure(
                    pl_module, batches, loss_fn, sites=table, estimator=self.estimator, rtol=self.rtol,
                    max_probes=self.max_probes, draw=self.draw, l1=self.l1, seed=self.seed, progress=show,
                    precision=self.precision,
                    share=shard_of(trainer), reuse=traces.find, resume=traces.partial,
                    enough=stable if self.stop == "plan" else None,
                )  # fmt: skip
                if self.given is None:
                    traces.store(self.sensitivity)
            # as the file tells it: a run that takes it from there chooses by the same digits
            self.sensitivity = Sensitivity.from_dict(self.sensitivity.to_dict())
            check_covers(self.sensitivity, table)
            if trainer.is_global_zero:
                self.sensitivity.save(folder / "sensitivity.json")
            traces.forget_partial(self.sensitivity.fingerprint)
            self.options = weigh(self.sensitivity, progress=show)
            problem = Problem(table, self.options, self.sensitivity, overhead, **constraints)
            chosen = self._select(trainer, pl_module, batches, loss_fn, problem)
            if "bootstrap" in self._selector.offers and self.stability_draws:
                chosen = with_bootstrap_stability(problem, chosen, bootstraps=self.stability_draws)
            lifted = list(guarded_mean_traces(self.sensitivity)[1])
            settings = {**chosen.settings, **self.sensitivity.settings, "seed": self.seed, "lifted": lifted}
            chosen = self._own(chosen).replace(settings=settings, fingerprint=self.sensitivity.fingerprint)
            plan = Plan.from_dict(trainer.strategy.broadcast(chosen.to_dict()))
            self.plan = plan
            if trainer.is_global_zero:
                plan.save(folder / "plan.json")
            self._draw_frontier(problem, folder if trainer.is_global_zero else None)
            warn_untrained(self.sensitivity, pl_module, batches, loss_fn, plan)
            if self.check_loss:
                self.loss_check = loss_per_site(
                    pl_module, batches, loss_fn, table, self.options, quantizer=self.quantizer, progress=show
                )
                if trainer.is_global_zero:
                    write_text(folder / "loss_check.csv", _csv(self.loss_check))
        self._log(trainer, plan)
        return plan

    def _select(
        self, trainer: Trainer, pl_module: LightningModule, batches: list[Any], loss_fn: Any, problem: Problem
    ) -> Plan:
        """The plan, with what its selector needs beside traces: eigenvalues, or the measured loss of plans."""
        pick = partial(select, problem, self.budget, self.selector, seed=self.selection_seed, bits=self.bits)
        if "eigenvalues" in self._selector.needs:
            free = [s.name for s in problem.sites if len({c.bits for c in problem.candidates[s.name]}) > 1]
            found = top_eigenvalues(
                pl_module, batches, loss_fn, sites=self.sites, only=free, rtol=self.rtol, seed=self.seed,
                progress=self.progress and shows_progress(trainer), share=shard_of(trainer),
            )  # fmt: skip
            self.eigenvalues = {n: max(0.0, v) for n, v in found.items()}
            chosen = pick(eigenvalues=self.eigenvalues)
            return chosen.replace(settings={**chosen.settings, "eigenvalues": self.eigenvalues})
        if "loss" in self._selector.needs:
            with loss_of_plan(pl_module, batches, loss_fn, quantizer=self.quantizer) as measure_loss:
                return pick(measure_loss=lambda plan: measure_loss(self._own(plan)))
        return pick()

    def _own(self, plan: Plan) -> Plan:
        return plan.replace(quantizer=self.quantizer.name, quantizer_options=dict(self.quantizer.options))

    def _draw_frontier(self, problem: Problem, folder: Path | None) -> None:
        try:
            self.frontier = plan_frontier(problem)
        except HawqError as error:  # ties and device pairs may couple too much for it, not for the plan
            self.frontier = None
            rank_zero_info(f"HAWQ: there is no frontier.csv: {error}")
            return
        if folder is not None:
            self.frontier.to_csv(folder / "frontier.csv")  # type: ignore[attr-defined]

    @property
    def _asked(self) -> str:
        """The question that the options answer, beside budget and constraints."""
        q = self.quantizer
        return f"{self.weight_bits} {self.activation_bits} {self.input_bits} {self.codes} {q.name} {dict(q.options)}"

    def _log(self, trainer: Trainer, plan: Plan) -> None:
        assert self.sensitivity is not None
        _, lifted = guarded_mean_traces(self.sensitivity)
        for note in (*self.sensitivity.notes, *lifted):
            rank_zero_info(f"HAWQ: {note}")
        rank_zero_info(describe(plan))
        values: dict[str, float] = {}
        for s in plan.sites:
            values[f"hawq/bits/{s.name}"] = s.bits
            for what, number in (("mean_trace", s.mean_trace), ("stderr", s.stderr), ("omega", s.omega)):
                if number is not None and math.isfinite(number):
                    values[f"hawq/{what}/{s.name}"] = number
        values |= {f"hawq/{k}": v for k, v in plan.costs.items()}
        for logger in trainer.loggers:
            logger.log_metrics(values, step=trainer.global_step)


def describe(plan: Plan) -> str:
    """One line about a plan."""
    counts: dict[int, int] = {}
    for s in plan.weights:
        counts[s.bits] = counts.get(s.bits, 0) + 1
    spread = ", ".join(f"{n} at {b} bit" for b, n in sorted(counts.items()))
    size = plan.costs.get("weight_bytes", 0.0)
    ratio = plan.costs.get("float_weight_bytes", 0.0) / size if size else 0.0
    return f"HAWQ plan: {spread}; weights {size / 1024:.1f} KiB, {ratio:.2f}x smaller; Omega {plan.omega:.3g}."


def _csv(rows: Sequence[Mapping[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=["site", "kind", "bits", "predicted", "measured"])
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
