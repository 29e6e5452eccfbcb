"""The callback that applies a plan: structure in ``setup``, bits as state, so that checkpoints restore themselves."""

from __future__ import annotations

from pathlib import Path

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from hawq_lightning._config import MeasureConfig, QuantizerConfig
from hawq_lightning._errors import HawqError, some
from hawq_lightning._patterns import Patterns
from hawq_lightning._plan import Plan
from hawq_lightning._types import Batch, StateDict
from hawq_lightning.callbacks._adopted import agrees, consistent, with_sizes
from hawq_lightning.callbacks._companion import Companion
from hawq_lightning.callbacks._handoff import Handoff
from hawq_lightning.callbacks._held_modules import FollowedCopies, modules_beside
from hawq_lightning.callbacks._optimized import add_learned_steps, warn_made_anew
from hawq_lightning.callbacks._rewritten import warn_rewritten
from hawq_lightning.callbacks._trainer import (
    after_layers_exist,
    builds_later,
    check_trainer,
    has_parent,
    insert_after,
    is_sharded,
    move_to_front,
    rerun_setup,
    scores_begin_anew,
    sync_averages,
)
from hawq_lightning.callbacks.fault_tolerance import ResumedStates
from hawq_lightning.layers import forget_calls
from hawq_lightning.quantization import (
    QuantizedWeight,
    check_plan,
    enable,
    enabled_bits,
    expect_attention,
    expect_results,
    plan_of,
    prepare,
    prepare_alike,
    quantized_layers,
    quantizer_of,
    reestimate,
    refresh,
    tie_scales,
    trained_quantizers,
    use_kernel,
    with_quantizer,
)


class ApplyPlan(Callback):
    """Turn layers into fake-quant layers at every stage, and enable them with a plan when fitting starts.

    A checkpoint carries the bits and ranges in the module's own state dict, so ``fit``, ``validate``, ``test`` and
    ``predict`` with ``ckpt_path`` rebuild the quantized network without the plan.

    Args:
        plan: what to apply, or its file; ``None``: only restore what a checkpoint holds.
        quantizer: which layers get quantizers, and of which kind; a registered name will do. The plan's bits are given
            to it. ``None``: the plan's own, or ``uniform``.

    Attributes:
        quantizer: the quantizer in force, with its options.
        given_plan: ``plan``, with costs that follow from its bits.

    Raises:
        HawqError: a file that is no plan, or an unknown quantizer; at the start of ``fit``: a plan for another model.
    """

    start_epoch = 0  # HAWQ has these three as arguments
    measure_config = MeasureConfig()
    progress = True

    def __init__(
        self,
        plan: Plan | str | Path | None = None,
        quantizer: str | QuantizerConfig | None = None,
    ) -> None:
        given = consistent(Plan.load(plan) if isinstance(plan, (str, Path)) else plan)
        if quantizer is None and given is not None:
            quantizer = QuantizerConfig(given.quantizer, options=given.quantizer_options)
        elif quantizer is None or isinstance(quantizer, str):
            quantizer = QuantizerConfig(quantizer or "uniform")
        self.quantizer_config = quantizer
        self.quantizer = quantizer_of(quantizer)
        self.given_plan = None if given is None else with_quantizer(given, self.quantizer)
        self._plan: Plan | None = None
        self._handoff = Handoff()
        self._copies = FollowedCopies()
        self._resumed = ResumedStates()
        self._refitted = -1
        self._told_float = False

    @property
    def has_plan(self) -> bool:
        """Whether there is a plan in force."""
        self._plan = self._plan or self._handoff.plan()
        return self._plan is not None

    @property
    def plan(self) -> Plan:
        """The plan in force.

        Raises:
            HawqError: there is none yet.
        """
        if not self.has_plan or self._plan is None:
            raise HawqError("There is no plan yet: it is chosen, or applied, when trainer.fit has started.")
        return self._plan

    def excluded(self, pl_module: torch.nn.Module) -> Patterns:
        """Patterns of layers that stay float."""
        return self.quantizer_config.exclude

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Make fake-quant layers, whatever the stage; go to the front of the callbacks, with every companion."""
        check_trainer(trainer)
        if self.quantizer.options.get("reestimate") and (name := is_sharded(trainer)):
            raise HawqError(f"{name} splits the weights; ranges cannot follow them: leave reestimate at 0.")
        before = move_to_front(trainer, self)
        insert_after(trainer, self, companions(trainer))
        try:
            self._prepare(pl_module)
        except HawqError:
            if not builds_later(pl_module):  # else the pattern may be for layers that do not exist yet
                raise
        after_layers_exist(pl_module, lambda: self._layers_exist(trainer, pl_module, stage))
        if not builds_later(pl_module):
            self._layers_exist(trainer, pl_module, stage)
        rerun_setup(before, trainer, pl_module, stage)
        if not enabled_bits(pl_module):
            self._handoff.restore(pl_module)

    def _prepare(self, pl_module: LightningModule) -> None:
        config = self.quantizer_config
        attention = config.attention or (self.given_plan is not None and bool(self.given_plan.products))
        prepare(pl_module, config.include, self.excluded(pl_module), self.quantizer, attention)
        expect_attention(pl_module)
        expect_results(pl_module)
        self._use_kernel(pl_module)

    def _use_kernel(self, pl_module: LightningModule) -> None:
        if self.quantizer_config.kernel != "torch":  # else a choice by hand stays
            use_kernel(pl_module, self.quantizer_config.kernel)

    def _layers_exist(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._prepare(pl_module)
        prepare_alike(pl_module, modules_beside(trainer, pl_module))
        complete = not {"setup", "configure_model"} & pl_module.__dict__.keys()
        if complete and stage == "fit" and self.given_plan and is_sharded(trainer) and not enabled_bits(pl_module):
            self.enable(trainer, pl_module, self.given_plan)  # steps are fitted to weights that are still whole

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Enable the given plan's quantizers, unless a checkpoint brought the model quantized."""
        self.before_data(trainer)
        add_learned_steps(trainer, pl_module)
        if not self.restored(pl_module):
            self.quantize(trainer, pl_module)

    def quantize(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give the module its bits now.

        Raises:
            HawqError: there is no plan, or it is for another model.
        """
        if self.given_plan is None:
            raise HawqError("ApplyPlan has no plan: give plan=, or a ckpt_path that holds a quantized model.")
        self.enable(trainer, pl_module, self.given_plan)

    def restored(self, pl_module: LightningModule) -> bool:
        """Whether quantizers are enabled already, by a checkpoint or an earlier fit; then their plan is adopted."""
        refresh(pl_module)
        if not enabled_bits(pl_module):
            return False
        if self.given_plan is not None and is_sharded(pl_module.trainer):
            self._plan = self.given_plan  # enabled in setup; what there is of the weights now has other shapes
            return True
        if self.given_plan is not None and self.given_plan.bits.items() - plan_of(pl_module).bits.items():
            check_plan(pl_module, self.given_plan)
            if not agrees(self.given_plan, pl_module):
                rank_zero_warn(
                    "HAWQ: the model was quantized by another plan than the one given; the model's own stays."
                )
                self._plan = with_sizes(plan_of(pl_module))
                tie_scales(pl_module, self._plan)
                return True
        if self._plan is None or not agrees(self._plan, pl_module):
            self._plan = self.given_plan or with_sizes(plan_of(pl_module))
        tie_scales(pl_module, self._plan)
        rank_zero_info("HAWQ: the model is quantized already; nothing is measured again.")
        return True

    def enable(self, trainer: Trainer, pl_module: LightningModule, plan: Plan) -> None:
        """Fill the quantizers of every process alike, and call the companions before and after."""
        for companion in companions(trainer):
            companion.before_enable(trainer, pl_module)
        enable(pl_module, plan)
        if not enabled_bits(pl_module):
            raise HawqError("The plan quantizes no layer of this model.")
        planned = {name for s in plan.sites for name in s.layers}
        left = [name for name in quantized_layers(pl_module) if name not in planned]
        if left and plan is self.given_plan:
            rank_zero_warn(f"HAWQ: the plan says nothing of {some(left, 4)}: they stay float.")
        sync_averages(trainer, pl_module)
        if names := scores_begin_anew(trainer):
            rank_zero_info(
                f"HAWQ: the scores of {', '.join(names)} begin anew: those so far are of the float network. Its files "
                "are kept."
            )
        self._plan = plan
        for companion in companions(trainer):
            companion.after_enable(trainer, pl_module)

    def change_plan(self, trainer: Trainer, pl_module: LightningModule, plan: Plan) -> None:
        """Other bits in the middle of a training; optimizers, companions and best scores go on as they are.

        Args:
            trainer: in ``fit``.
            pl_module: quantized.
            plan: for it.
        """
        enable(pl_module, plan)
        sync_averages(trainer, pl_module)
        self._plan = plan

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Mirrors follow buffers that averaging or broadcasting wrote; a restored model tells its plan."""
        self._copies.follow(trainer, pl_module, self._plan)
        refresh(pl_module)
        if self._plan is None and enabled_bits(pl_module):
            self._plan = with_sizes(plan_of(pl_module))
        warn_rewritten(trainer, pl_module, self._plan)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """As before a validation; a network that is still float is told once."""
        self.on_validation_start(trainer, pl_module)
        if not enabled_bits(pl_module) and not self._told_float:
            self._told_float = True
            rank_zero_warn(
                f"HAWQ: this network is float: no quantizer is enabled, so what trainer.{trainer.state.fn} gives is "
                "not of the quantized network. Fit it first, or give a ckpt_path that was saved after that."
            )

    on_predict_start = on_test_start

    def before_data(self, trainer: Trainer) -> None:
        """A resumed epoch starts from the random states of its checkpoint: its iterator is made after this."""
        self._resumed.before_data(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The iterator stands; an undisturbed run would not come by here, so what is drawn here must not count."""
        self._resumed.iterator_stands(trainer)
        self._use_kernel(pl_module)  # a plan may have brought quantizers of results
        warn_made_anew(trainer, pl_module)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """See :meth:`on_train_start`."""
        self._resumed.epoch_starts()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """See :meth:`on_train_start`: an epoch may have been resumed behind its last batch."""
        self._copies.follow(trainer, pl_module, self._plan)
        self._resumed.epoch_ends()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Tell the parent process, where there is one; by now averaged weights are in place."""
        if self._plan is not None and has_parent(trainer) and trainer.is_global_zero:
            self._handoff.write(self._plan, pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int) -> None:
        """Ranges that follow the weights, after every so many optimizer steps; copies that follow the network."""
        self._copies.follow(trainer, pl_module, self._plan, thorough=False)
        if self.quantizer.options.get("reestimate") and self._refitted != trainer.global_step:
            self._refitted = trainer.global_step  # batches that are accumulated share a step
            reestimate(pl_module, trainer.global_step)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: StateDict) -> None:
        """Random states of all processes."""
        self._resumed.save(trainer, checkpoint)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: StateDict) -> None:
        """See :meth:`on_save_checkpoint`."""
        if trainer.state.fn == "fit":
            self._refuse_float_optimizer(pl_module, checkpoint)
        self._resumed.load(trainer, checkpoint)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Shards are matched by name before anything of ours sees them, and 0.1.0 had other names."""
        forget_calls()
        if "Missing key in checkpoint" in str(exception) and "_quantizer.num_bits" in str(exception):
            rank_zero_warn(
                "HAWQ: this folder of shards is of release 0.1.0, whose quantizers have other names there: make one "
                "file of it (python -m lightning.pytorch.utilities.consolidate_checkpoint FOLDER), for ckpt_path."
            )

    def _refuse_float_optimizer(self, pl_module: LightningModule, checkpoint: StateDict) -> None:
        """Learned steps are parameters, for which the optimizer of a float training has no state."""
        learned = any(p.requires_grad for layer in quantized_layers(pl_module).values() for p in learned_of(layer))
        quantized = bool(trained_quantizers(checkpoint.get("state_dict", {})))
        if learned and not quantized and checkpoint.get("optimizer_states"):
            raise HawqError(
                f"This checkpoint is of float training, and quantizer {self.quantizer.name!r} learns parameters that "
                "its optimizer does not know: load its weights into the model instead, and fit without ckpt_path."
            )

    def state_dict(self) -> StateDict:
        """The plan, in plain types."""
        return {} if self._plan is None else {"plan": self._plan.to_dict()}

    def load_state_dict(self, state_dict: StateDict) -> None:
        """See :meth:`state_dict`."""
        if "plan" in state_dict:
            self._plan = Plan.from_dict(state_dict["plan"])


def companions(trainer: Trainer) -> list[Companion]:
    """The Trainer's companions, in the order in which they stand."""
    return [c for c in trainer.callbacks if isinstance(c, Companion)]  # type: ignore[attr-defined]


def quantizing_callback(trainer: Trainer) -> ApplyPlan | None:
    """The Trainer's ``HAWQ`` or ``ApplyPlan``, if it has one."""
    return next((c for c in trainer.callbacks if isinstance(c, ApplyPlan)), None)  # type: ignore[attr-defined]


def learned_of(layer: QuantizedWeight) -> list[torch.nn.Parameter]:
    """Parameters of a fake-quant layer's quantizers."""
    return [*layer.weight_quantizer.parameters(), *layer.input_quantizer.parameters()]
