"""The callback that users add: traces, plan, fake-quant, and fine-tuning by the Trainer that they already have."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from hawq_lightning._errors import HawqError
from hawq_lightning._plan import Candidate, Plan
from hawq_lightning._site_table import SiteTable
from hawq_lightning._sites import Patterns, quantizable_layers
from hawq_lightning.callbacks._apply import ApplyPlan
from hawq_lightning.callbacks._block_order import BlockwiseOrder
from hawq_lightning.callbacks._distillation import Distillation
from hawq_lightning.callbacks._freeze import FreezeSchedule
from hawq_lightning.callbacks._measure import MeasureTraces
from hawq_lightning.callbacks._post_training import improve, outside_of_evaluation
from hawq_lightning.callbacks._trainer import insert_after, sync_averages
from hawq_lightning.quantization import QuantizerSpec, enabled_bits
from hawq_lightning.quantization.post_training import check_methods
from hawq_lightning.selection import Frontier
from hawq_lightning.sensitivity import Sensitivity


class HAWQ(Callback):
    """HAWQ-V2 in one callback: :class:`MeasureTraces` and :class:`ApplyPlan` together.

    Before fitting (or after ``start`` epochs of it) the traces of every layer are measured on the Trainer's own train
    data, bits are chosen under the budget, and fake-quantizers are armed; the Trainer then fine-tunes them.

    Args:
        weight_bits: widths that weights may take, 1 to 8.
        activation_bits: likewise 2 to 8; ``None`` leaves activations float.
        budget: ``"8x"``, ``"3.5bit"``, ``"8MB"``, ``"8MiB"``, ``{"bops": "50%"}``, ``{"act": "7.6x"}`` or several.
        selector: rule of choice: ``pareto`` (exact), ``monotone`` (the paper's set B), ``uniform`` ...
        constraints: keywords of :class:`hawq_lightning.selection.Problem`: ``ties``, ``fixed``, ``min_bits`` ...
        bits: for ``selector="manual"``: site or glob -> bits, or a file of them.
        latency: CSV of milliseconds a layer and width, as ``hawq-lightning-export`` writes it; for a latency budget.
        estimator: ``auto``, ``ggn``, ``hessian``, ``hutchinson`` or ``exact``; see :func:`hawq_lightning.measure`.
        l1: what L1 losses, which have no curvature, count as: ``fisher`` or ``zero`` (:func:`hawq_lightning.measure`).
        images: how many train images to measure on.
        rtol: standard error to reach, as a share of each trace.
        max_probes: random vectors a batch at the most.
        draw: images that a round of probes sends back: ``auto``, ``all`` or ``curvature``.
        stop: ``error``, or ``plan``: also as soon as the plan no longer changes; see :class:`MeasureTraces`.
        precision: of the passes that measure: ``float32``, or ``bf16`` where a probe agrees with float32 within 5%.
        start: epochs of float training before measuring; 0: at once.
        plan: install this plan (or file) and measure nothing.
        sensitivity: choose from these traces (or file) and measure nothing.
        include: glob on layer names, layer type, or ``f(name, module) -> bool``.
        exclude: likewise.
        loss_fn: ``loss_fn(module, batch) -> scalar`` instead of ``training_step``.
        input_bits: width of what the network itself reads; ``None``: as other activations.
        codes: weights of 2 bits and more: ``auto``, ``affine`` or ``midrise``.
        quantizer: registered name, see :func:`hawq_lightning.quantization.quantizer_names`; ``None``: that of ``plan``,
            or ``uniform``.
        quantizer_options: keywords of the quantizer, such as ``{"ranges": "percentile"}``.
        check_loss: also measure the loss change of every site and width.
        seed: of all draws.
        selection_seed: of random selectors; default: ``seed``.
        cache: folder of measurements that runs share: the same weights, data and settings are measured once.
        dirpath: where results are saved; default: the logger's folder.
        freeze_batchnorm: epoch, or share of the training such as ``0.8``, from which BatchNorm's statistics are fixed.
        freeze_ranges: likewise for learned steps and re-estimated ranges; see :class:`FreezeSchedule`.
        distill: weight of the distillation from the float network in the loss; 0: none. See :class:`Distillation`.
        distill_temperature: of its softmax.
        order: ``omega``: quantizers are switched on block-wise, the largest Omega first; see :class:`BlockwiseOrder`.
        order_until: moment at which all are on.
        post_training: improve rounding and biases without training; ``True``, or names of
            :data:`hawq_lightning.quantization.post_training.METHODS`. ``trainer.validate`` alone then measures,
            quantizes, improves and scores the network.
        progress: show bars where the Trainer does.

    Attributes:
        plan, sensitivity, frontier, sites, loss_check: after ``fit`` has started.
        improved: what each method of ``post_training`` reports of each layer.

    Raises:
        HawqError: arguments out of range; at the start of ``fit``: a budget that no plan meets, no quantizable layer,
            NaN in loss or weights, a plan for another model, no train data.
    """

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
        start: int = 0,
        plan: Plan | str | Path | None = None,
        sensitivity: Sensitivity | str | Path | None = None,
        include: Patterns = None,
        exclude: Patterns = None,
        loss_fn: Callable[[Any, Any], torch.Tensor] | None = None,
        input_bits: int | None = 8,
        codes: str = "auto",
        quantizer: str | QuantizerSpec | None = None,
        quantizer_options: Mapping[str, Any] | None = None,
        check_loss: bool = False,
        seed: int = 0,
        selection_seed: int | None = None,
        cache: str | Path | None = None,
        dirpath: str | Path | None = None,
        freeze_batchnorm: int | float | str | None = None,
        freeze_ranges: int | float | str | None = None,
        distill: float = 0.0,
        distill_temperature: float = 4.0,
        order: str | None = None,
        order_until: int | float | str = 0.5,
        post_training: bool | str | Sequence[str] | None = None,
        progress: bool = True,
    ) -> None:
        if isinstance(start, bool) or not isinstance(start, int) or start < 0:
            raise HawqError(f"start is {start!r}; it is a number of epochs, 0 or more.")
        self.start = start
        self.applier = ApplyPlan(plan, include, exclude, quantizer, quantizer_options)
        if self.applier.quantizer.freezes_norms and freeze_batchnorm is None:
            freeze_batchnorm = start
        self.measure_callback = MeasureTraces(
            weight_bits, activation_bits, budget, selector=selector, constraints=constraints, bits=bits,
            latency=latency, estimator=estimator, l1=l1, images=images, rtol=rtol, max_probes=max_probes,
            draw=draw, stop=stop, precision=precision, sensitivity=sensitivity, include=include, exclude=exclude,
            loss_fn=loss_fn, input_bits=input_bits, codes=codes, quantizer=self.applier.quantizer,
            check_loss=check_loss, seed=seed, selection_seed=selection_seed, cache=cache, dirpath=dirpath,
            progress=progress,
        )  # fmt: skip
        self.distillation = Distillation(distill, distill_temperature) if distill else None
        self.extra_callbacks: list[Callback] = [self.distillation] if self.distillation else []
        if freeze_batchnorm is not None or freeze_ranges is not None:
            self.extra_callbacks.append(FreezeSchedule(freeze_batchnorm, freeze_ranges))
        if order is not None:
            self.extra_callbacks.append(BlockwiseOrder(order, order_until, start=start))
        self.post_training = post_training is True or check_methods(post_training)
        self.improved: dict[str, dict[str, Any]] = {}

    @property
    def plan(self) -> Plan | None:
        """The plan in force."""
        return self.applier.plan

    @property
    def sensitivity(self) -> Sensitivity | None:
        """The traces, if they were measured or given."""
        return self.measure_callback.sensitivity

    @property
    def frontier(self) -> Frontier | None:
        """Every plan that no other beats in both Omega and size."""
        return self.measure_callback.frontier

    @property
    def sites(self) -> SiteTable | None:
        """The sites found."""
        return self.measure_callback.sites

    @property
    def options(self) -> Mapping[str, tuple[Candidate, ...]]:
        """Every option weighed, by site."""
        return self.measure_callback.options

    @property
    def loss_check(self) -> list[dict[str, Any]]:
        """Predicted and measured loss changes, if asked for."""
        return self.measure_callback.loss_check

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Make twins at every stage."""
        self.applier.exclude = self.measure_callback.excluded(pl_module)
        self.applier.prepare(trainer, pl_module, stage, self)
        insert_after(trainer, self, self.extra_callbacks)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure, select, arm; nothing of it if a checkpoint has armed the model."""
        self.applier.before_data(trainer)
        known = self.plan is not None
        if self.applier.restored(pl_module):
            if not known and self.applier._given is None:
                rank_zero_warn(
                    "HAWQ: the model came with quantizers that are armed; it keeps their bits, whatever the budget. "
                    "To choose anew, call hawq_lightning.quantization.unquantize(model) first."
                )
            return
        self.applier.plan = None  # of a model that this callback quantized before
        if not quantizable_layers(pl_module)[0]:
            raise HawqError(f"{type(pl_module).__name__} has no quantizable layer (convolution or linear).")
        if self.start == 0:
            self._quantize(trainer, pl_module)
        elif trainer.max_epochs is not None and 0 < trainer.max_epochs <= self.start:
            raise HawqError(f"start={self.start} leaves none of the {trainer.max_epochs} epochs for fine-tuning.")
        elif self.applier._given is None and trainer.global_step == 0:
            self.measure_callback.check_feasible_early(trainer, pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Random states of a resumed epoch."""
        self.applier.on_train_start(trainer, pl_module)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin after ``start`` epochs of float training."""
        self.applier.on_train_epoch_start(trainer, pl_module)
        if trainer.current_epoch >= self.start and not enabled_bits(pl_module):
            self._quantize(trainer, pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Ranges that follow the weights, after every so many optimizer steps."""
        self.applier.on_train_batch_start(trainer, pl_module, batch, batch_idx)

    def _quantize(self, trainer: Trainer, pl_module: LightningModule) -> None:
        given = self.applier._given
        plan = given if given is not None else self.measure_callback.analyze(trainer, pl_module)
        if self.distillation is not None:
            self.distillation.take(trainer, pl_module)
        self.applier.enable(trainer, pl_module, plan)
        if self.post_training:
            m = self.measure_callback
            self.improved = improve(trainer, pl_module, self.post_training, m.images, m.seed, m.loss_fn, m.progress)
            sync_averages(trainer, pl_module, weights=True)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Mirrors follow buffers; with ``post_training``, ``trainer.validate`` quantizes a float network."""
        self.applier.on_validation_start(trainer, pl_module)
        if self.post_training and trainer.state.fn == "validate" and not enabled_bits(pl_module):
            with outside_of_evaluation(pl_module):
                self._quantize(trainer, pl_module)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Mirrors follow buffers."""
        self.applier.on_validation_start(trainer, pl_module)
        if self.post_training and not enabled_bits(pl_module):
            rank_zero_warn("HAWQ: the network is float here; trainer.validate() quantizes it.")

    on_predict_start = on_test_start

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say so if training ended before its ``start``."""
        if self.start and not enabled_bits(pl_module):
            rank_zero_warn(
                f"HAWQ: training ended in epoch {trainer.current_epoch}, before start={self.start} epochs were over: "
                "the network is float, and nothing was measured."
            )

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Tell the parent process, where there is one."""
        self.applier.on_fit_end(trainer, pl_module)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Random states."""
        self.applier.on_save_checkpoint(trainer, pl_module, checkpoint)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Random states."""
        self.applier.on_load_checkpoint(trainer, pl_module, checkpoint)

    def state_dict(self) -> dict[str, Any]:
        """Plan and traces, in plain types."""
        state = self.applier.state_dict()
        return state | ({"sensitivity": self.sensitivity.to_dict()} if self.sensitivity is not None else {})

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """See :meth:`state_dict`."""
        self.applier.load_state_dict(state_dict)
        if "sensitivity" in state_dict:
            self.measure_callback.sensitivity = Sensitivity.from_dict(state_dict["sensitivity"])
