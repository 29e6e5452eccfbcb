"""The callback that distils from the float network while the quantized one is fine-tuned."""

from __future__ import annotations

import contextlib
import math
import weakref
from collections.abc import Callable

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature

from hawq_lightning._errors import HawqError
from hawq_lightning._types import StateDict
from hawq_lightning.callbacks._batch_before import BatchBefore
from hawq_lightning.callbacks._companion import Companion
from hawq_lightning.callbacks._trainer import (
    StepOutput,
    float_copy,
    is_sharded,
    loss_of,
    patch_training_step,
    restore_training_step,
    with_loss,
)
from hawq_lightning.callbacks.fault_tolerance import random_states, set_random_states
from hawq_lightning.quantization import (
    Enough,
    GraphOutputs,
    Head,
    HeadOutputs,
    distance,
    enabled_bits,
    find_heads,
    unquantize,
)
from hawq_lightning.sensitivity import noisy_modules, random_states_kept


class Distillation(Companion):
    """Add to the training loss how far the last layers' outputs are from those of the float network.

    The teacher is the network as it was before its quantizers were enabled, in evaluation mode where modes matter
    (BatchNorm, dropout). It runs the module's own ``training_step`` on the same batch, as it was before the module
    changed it, with the same random draws up to its last layer, without gradients. What the loss does with an output
    decides how it is compared: logits of a softmax by KL divergence, others by squared error; see
    :func:`hawq_lightning.quantization.distance`.

    The teacher's weights go into the checkpoint with the callback's state, never into the module's state dict.

    Args:
        weight: of the added term; the loss of the module itself keeps weight 1.
        temperature: of the softmax.

    Attributes:
        heads: the layers compared, once training has begun.

    Raises:
        HawqError: a number out of range; at the start of training: optimization by hand, a strategy that splits layers,
            a step that takes ``dataloader_iter``, or a module that cannot be copied.
    """

    def __init__(self, weight: float = 1.0, temperature: float = 4.0) -> None:
        for name, value in (("weight", weight), ("temperature", temperature)):
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
                raise HawqError(f"Distillation({name}={value!r}): it is a positive number.")
        self.weight, self.temperature = float(weight), float(temperature)
        self.heads: list[Head] = []
        self._teacher: LightningModule | None = None
        self._of: weakref.ref[LightningModule] | None = None
        self._saved: dict[str, torch.Tensor] | None = None
        self._copy = False
        self._before = BatchBefore()

    def before_enable(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The float network becomes the teacher."""
        self.copy_teacher(trainer, pl_module)

    def copy_teacher(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make the module as it is now, quantizers off, the teacher.

        Raises:
            HawqError: it cannot be copied.
        """
        if not pl_module.automatic_optimization:
            raise HawqError(
                f"{type(pl_module).__name__} optimizes by hand, so distillation cannot add to its loss; leave "
                "Distillation out, or set automatic_optimization."
            )
        if name := is_sharded(trainer):
            raise HawqError(f"{name} splits the layers; distillation needs them whole.")
        if is_param_in_hook_signature(pl_module.training_step, "dataloader_iter", explicit=True):
            raise HawqError(
                f"{type(pl_module).__name__}.training_step takes dataloader_iter, so its teacher would get another "
                "batch than it; let the step take batch, or leave Distillation out."
            )
        self._teacher = float_copy(pl_module)
        unquantize(self._teacher)
        self._of = weakref.ref(pl_module)
        self.heads = []
        self._before = BatchBefore()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take up the teacher of a checkpoint."""
        if self._saved is not None:
            self.copy_teacher(trainer, pl_module)
            assert self._teacher is not None
            self._teacher.load_state_dict(self._saved)
            self._saved = None
        elif enabled_bits(pl_module) and not self._teaches(pl_module) and trainer.global_step > 0:
            rank_zero_warn(
                "HAWQ: the checkpoint holds no float network to distil from; its fine-tuned weights take its place."
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Step in: a fit that goes on within an epoch does not start one."""
        self.on_train_epoch_start(trainer, pl_module)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Step in as soon as the quantizers are enabled."""
        if not enabled_bits(pl_module):
            return
        if not self._teaches(pl_module):
            self.copy_teacher(trainer, pl_module)
        assert self._teacher is not None
        self._teacher.trainer = trainer
        self._teacher.train()  # detectors return losses in training mode only
        for module in noisy_modules(self._teacher):
            module.eval()
        patch_training_step(pl_module, self._step)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The module gets its own step back."""
        restore_training_step(pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """As at the end."""
        restore_training_step(pl_module)

    def _teaches(self, pl_module: LightningModule) -> bool:
        return self._teacher is not None and self._of is not None and self._of() is pl_module

    def _step(
        self, step: Callable[..., StepOutput], pl_module: LightningModule, *args: object, **kwargs: object
    ) -> StepOutput:
        states = random_states()
        held_args, held_kwargs = self._before.hold((args, kwargs))
        if not self.heads:
            out, student = self._first(step, pl_module, *args, **kwargs)
        else:
            with HeadOutputs(pl_module, self.heads, copy=self._copy) as seen:
                out = step(*args, **kwargs)
            student = seen.tensors
        loss, kept = loss_of(out), self._before.is_held()
        if loss is None or not student or not kept:
            return out
        teacher = self._teacher_outputs(states, student, *held_args, **held_kwargs)
        added = distance(self.heads, student, teacher, self.temperature)
        pl_module.log("train/distillation", added.detach())
        return with_loss(out, loss + self.weight * added.to(loss.dtype))

    def _first(
        self, step: Callable[..., StepOutput], pl_module: LightningModule, *args: object, **kwargs: object
    ) -> tuple[StepOutput, dict[str, list[torch.Tensor]]]:
        """A step that finds the heads."""
        with GraphOutputs(pl_module) as outputs:
            out = step(*args, **kwargs)
        loss = loss_of(out)
        if loss is None:
            return out, {}
        self.heads = find_heads(loss, outputs)
        if not self.heads:
            raise HawqError(
                f"The loss of {type(pl_module).__name__}.training_step depends on no layer's output that distillation "
                "can see (a compiled module hides them); leave Distillation out."
            )
        shown = ", ".join(f"{h.name} ({h.distance})" for h in self.heads)
        rank_zero_info(f"HAWQ: distils from the float network's outputs: {shown}.")
        names = {h.name for h in self.heads}
        student: dict[str, list[torch.Tensor]] = {n: [] for n in names}
        for name, tensor, version in zip(outputs.names, outputs.tensors, outputs.versions):
            if name in names:
                student[name].append(tensor)
                self._copy |= tensor._version != version
        return out, {} if self._copy else student  # overwritten outputs: from the next step on

    @torch.no_grad()
    def _teacher_outputs(
        self, states: StateDict, student: dict[str, list[torch.Tensor]], *args: object, **kwargs: object
    ) -> dict[str, list[torch.Tensor]]:
        """The teacher's outputs on the same batch, with the random draws that the student had."""
        assert self._teacher is not None
        expected = sum(len(t) for t in student.values())
        with random_states_kept(), HeadOutputs(self._teacher, self.heads, enough=expected) as seen:
            set_random_states(states)
            with contextlib.suppress(Enough):
                self._teacher.training_step(*args, **kwargs)
        for name, outputs in student.items():
            if [t.shape for t in outputs] != [t.shape for t in seen.tensors[name]]:
                raise HawqError(f"Layer {name!r} gave the float network other outputs; leave Distillation out.")
        return seen.tensors

    def __getstate__(self) -> StateDict:
        """For processes that are spawned: the teacher's weights, from which it is built again."""
        return {**self.__dict__, "_saved": self.state_dict().get("teacher"), "_teacher": None, "_of": None}

    def state_dict(self) -> StateDict:
        """The teacher's weights."""
        return {} if self._teacher is None else {"teacher": self._teacher.state_dict()}

    def load_state_dict(self, state_dict: StateDict) -> None:
        """See :meth:`state_dict`."""
        self._saved = state_dict.get("teacher")
