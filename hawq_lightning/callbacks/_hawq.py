"""The callback that users add: traces, plan, fake-quant, and fine-tuning by the Trainer that they already have."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import EllipsisType

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn

from hawq_lightning._config import MeasureConfig, QuantizerConfig, SelectConfig, whole, with_shorthands
from hawq_lightning._errors import HawqError
from hawq_lightning._patterns import Patterns
from hawq_lightning._plan import Plan
from hawq_lightning._sites import check_layers, quantizable_layers
from hawq_lightning._types import BatchSizeFn, Budget, StateDict
from hawq_lightning.callbacks._apply import ApplyPlan
from hawq_lightning.callbacks._feasible import exclude_patterns
from hawq_lightning.callbacks._freeze import FreezeSchedule
from hawq_lightning.callbacks._measure import MeasureTraces
from hawq_lightning.callbacks._optimized import add_learned_steps
from hawq_lightning.callbacks._results import HasResults
from hawq_lightning.quantization import check_plan, enabled_bits
from hawq_lightning.sensitivity import Sensitivity


class HAWQ(HasResults, ApplyPlan):
    """HAWQ-V2 in one callback: :class:`MeasureTraces`, then :class:`ApplyPlan`.

    Before fitting (or after ``start_epoch`` epochs of it) the traces of every layer are measured on the Trainer's own
    train data, bits are chosen under the budget, and fake-quantizers are enabled; the Trainer then fine-tunes them.

    Args:
        weight_bits: short for ``QuantizerConfig(weight_bits=...)``: widths that weights may take.
        activation_bits: short for ``QuantizerConfig(activation_bits=...)``; ``None`` leaves activations float.
        budget: short for ``SelectConfig(budget=...)``: ``"8x"``, ``"3.5bit"``, ``"8MB"``, ``{"bops": "50%"}`` ...;
            or by loss, ``{"kl": 0.02}``, ``{"agreement": "99%"}``: the smallest plan that measures so on held-out data.
        quantizer: which layers get quantizers, of which kind, and the widths to choose from; a registered name will do.
            ``None``: the kind that ``plan`` was made for, or ``uniform``.
        measure: how traces are measured.
        batch_size_fn: short for ``MeasureConfig(batch_size_fn=...)``: samples in a batch of a class of your own.
        select: how bits are chosen.
        plan: apply this plan (or file) and measure nothing.
        sensitivity: choose by these traces (or file) and measure nothing.
        start_epoch: epochs of float training before measuring; 0: at once.
        dirpath: folder of ``sensitivity.json``, ``frontier.csv`` and ``plan.json``; ``None``: the logger's.
        progress: show bars where the Trainer does.

    Attributes:
        plan, sensitivity, frontier, sites, outlook, candidates, loss_per_site: once ``fit`` has started; before that
            the first five raise HawqError.

    Raises:
        HawqError: a setting out of range, or given by its short form and in a config; at the start of ``fit``: a budget
            that no plan meets, no quantizable layer, NaN in loss or weights, a plan for another model, no train data.
    """

    def __init__(
        self,
        weight_bits: int | Sequence[int] | None = None,
        activation_bits: int | Sequence[int] | EllipsisType | None = ...,
        budget: Budget | None = None,
        *,
        quantizer: str | QuantizerConfig | None = None,
        measure: MeasureConfig | None = None,
        select: SelectConfig | None = None,
        plan: Plan | str | Path | None = None,
        sensitivity: Sensitivity | str | Path | None = None,
        start_epoch: int = 0,
        dirpath: str | Path | None = None,
        progress: bool = True,
        batch_size_fn: BatchSizeFn | None = None,
    ) -> None:
        super().__init__(plan, quantizer)
        self.start_epoch = whole("start_epoch", start_epoch, 0)
        widths: dict[str, object] = {} if weight_bits is None else {"weight_bits": weight_bits}
        widths |= {} if isinstance(activation_bits, EllipsisType) else {"activation_bits": activation_bits}
        self.quantizer_config = with_shorthands(self.quantizer_config, **widths)
        select = with_shorthands(select or SelectConfig(), **({} if budget is None else {"budget": budget}))
        counting: dict[str, object] = {} if batch_size_fn is None else {"batch_size_fn": batch_size_fn}
        measure = with_shorthands(measure or MeasureConfig(), **counting)
        self.measure_callback = MeasureTraces(
            quantizer=self.quantizer_config, measure=measure, select=select, sensitivity=sensitivity, dirpath=dirpath,
            progress=progress,
        )  # fmt: skip
        self.measure_callback.only_needed = True
        self.results = self.measure_callback.results
        self.measure_config, self.progress = self.measure_callback.measure, progress
        self._freeze = FreezeSchedule(batchnorm=self.start_epoch) if self.quantizer.freezes_norms else None

    def excluded(self, pl_module: torch.nn.Module) -> Patterns:
        """Patterns of layers that stay float: the user's, and the module's own ``quantization_exclude``."""
        return exclude_patterns(self.quantizer_config, pl_module)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """As ApplyPlan; for a quantizer that needs it, BatchNorm's statistics freeze unless the user schedules that."""
        listed = trainer.callbacks  # type: ignore[attr-defined]
        if self._freeze is not None and not any(isinstance(c, FreezeSchedule) and c.batchnorm for c in listed):
            trainer.callbacks = [*listed, self._freeze]  # type: ignore[attr-defined]
        super().setup(trainer, pl_module, stage)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure, select, enable; nothing of it if a checkpoint brought the model quantized."""
        self.before_data(trainer)
        add_learned_steps(trainer, pl_module)
        chosen_before = self.has_plan
        if self.restored(pl_module):
            if not chosen_before and self.given_plan is None:
                rank_zero_warn(
                    "HAWQ: the model came with quantizers that are enabled; it keeps their bits, whatever the budget. "
                    "To choose anew, call hawq_lightning.quantization.unquantize(model) first."
                )
            return
        self._plan = None  # of a model that this callback quantized before
        check_layers(pl_module, *quantizable_layers(pl_module, self.quantizer_config.include, self.excluded(pl_module)))
        epochs, start = trainer.max_epochs, self.start_epoch
        if start == 0:
            self.quantize(trainer, pl_module)
        elif epochs is not None and 0 < epochs <= start:
            raise HawqError(f"start_epoch={start} leaves none of the {epochs} epochs for fine-tuning.")
        elif trainer.global_step == 0:
            self.check_early(trainer, pl_module)

    def check_early(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse before a training what can be told without one: a plan or traces of another model, an unmet budget."""
        if self.given_plan is not None:
            check_plan(pl_module, self.given_plan)
        else:
            self.measure_callback.check_feasible_early(trainer, pl_module)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin after ``start_epoch`` epochs of float training."""
        super().on_train_epoch_start(trainer, pl_module)
        if trainer.current_epoch >= self.start_epoch and not enabled_bits(pl_module):
            self.quantize(trainer, pl_module)

    def quantize(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure and choose, unless a plan was given, and give the module its bits now."""
        plan = self.given_plan or self.measure_callback.analyze(trainer, pl_module)
        self.enable(trainer, pl_module, plan)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say so if training ended before its ``start_epoch``."""
        if self.start_epoch and not enabled_bits(pl_module):
            rank_zero_warn(
                f"HAWQ: training ended in epoch {trainer.current_epoch}, before start_epoch={self.start_epoch} epochs "
                "were over: the network is float, and nothing was measured."
            )

    def state_dict(self) -> StateDict:
        """Plan and traces, in plain types."""
        traces = {"sensitivity": self.sensitivity.to_dict()} if self.has_sensitivity else {}
        return super().state_dict() | traces

    def load_state_dict(self, state_dict: StateDict) -> None:
        """See :meth:`state_dict`."""
        super().load_state_dict(state_dict)
        if "sensitivity" in state_dict:
            self.results.sensitivity = Sensitivity.from_dict(state_dict["sensitivity"])
