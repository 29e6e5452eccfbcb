"""``training_step`` lent out as a plain function of module and batch, and everything put back afterwards."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch.overrides import TorchFunctionMode
from torchmetrics import Metric

from hawq_lightning._batches import fresh_copy
from hawq_lightning._errors import HawqError
from hawq_lightning._types import Batch, FunctionInputs, LossFn, Options
from hawq_lightning.callbacks._trainer._data_state import data_of, data_state_kept
from hawq_lightning.callbacks._trainer._epoch_length import epoch_length_kept
from hawq_lightning.callbacks._trainer._made_later import made_later
from hawq_lightning.callbacks._trainer._manual_loss import LossCaptured, manual_backward
from hawq_lightning.callbacks._trainer._namespaces import kinds
from hawq_lightning.callbacks._trainer._silent_logging import silent_logging
from hawq_lightning.callbacks._trainer._skipped import SkippedBatch
from hawq_lightning.sensitivity import HeldAttributes, random_states_kept

_READ = (
    "HAWQ: {name}.training_step reads gradients of parameters before its optimizer steps. What it has sent back until "
    "then is the loss that is measured; if other losses follow, give HAWQ(measure=MeasureConfig(loss_fn=...)), a "
    "function of (module, batch) that returns their sum."
)
_EARLY = (
    "HAWQ runs training_step before training starts, with loggers that write nothing and return nothing. If that is "
    "why it fails: {hint}."
)

_MAYBE_EARLY = (
    TypeError,
    ValueError,
    LookupError,
    OSError,
)  # what code raises that got other values than it reckons with


class _Backward(TorchFunctionMode):
    """What becomes of ``loss.backward()``: in this thread, and within one step alone.

    Args:
        instead: takes the arguments of ``torch.Tensor.backward``.
    """

    def __init__(self, instead: Callable[..., None]) -> None:
        super().__init__()
        self._instead = instead

    def __torch_function__(
        self, func: Callable[..., object], types: object, args: FunctionInputs = (), kwargs: Options | None = None
    ) -> object:
        run = self._instead if func is torch.Tensor.backward else func
        return run(*args, **(kwargs or {}))


@contextmanager
def loss_from_training_step(
    trainer: Trainer,
    pl_module: LightningModule,
    loss_fn: LossFn | None = None,
    before: Callable[[], None] = lambda: None,
) -> Iterator[LossFn]:
    """Lend ``training_step`` (or the user's ``loss_fn``) as ``loss(module, batch)``; afterwards nothing has changed.

    ``before`` is called before every loss, and may raise.

    Logging is silent, see :func:`silent_logging`; metrics, counters, lists and modes of every submodule are put back,
    and those of the data.
    """
    stage, hook = trainer.state.stage, pl_module._current_fx_name
    modules = list(pl_module.modules())
    modes = [(m, m.training) for m in modules]
    attributes = HeldAttributes(modules)
    losses: list[torch.Tensor] = []

    def by_hand(
        loss: torch.Tensor, gradient: torch.Tensor | None = None, retain_graph: bool | None = None, **how: Any
    ) -> None:
        """The graph stays for the probes; where no graph is built there is nothing to do."""
        losses.append(loss)
        if loss.requires_grad:
            torch.autograd.backward(loss, gradient, retain_graph=True, **how)

    try:
        trainer.training = True
        pl_module._current_fx_name = "training_step"
        for m in modules:
            if isinstance(m, Metric):
                m.dist_sync_on_step = False  # ranks hold unequal numbers of batches
                m.sync_on_compute = False
        with (
            epoch_length_kept(trainer),
            _data_kept(trainer, pl_module),
            silent_logging(trainer, pl_module) as forget,
        ):

            def start() -> None:
                before()
                forget()

            yield functools.partial(_loss, start, loss_fn, losses, by_hand, [])
    finally:
        attributes.put_back()
        for m, mode in modes:
            m.training = mode
        pl_module._current_fx_name = hook
        trainer.state.stage = stage


def _data_kept(trainer: Trainer, pl_module: LightningModule) -> AbstractContextManager[None]:
    """What steps and hooks move of the data, unless the loaders that training will read were made meanwhile."""
    loop = trainer.fit_loop
    ready = loop._combined_loader is not None
    return data_state_kept(
        *data_of(trainer), network=pl_module, unless=lambda: not ready and loop._combined_loader is not None
    )


def _has_train_data(trainer: Trainer) -> bool:
    return trainer.train_dataloader is not None


def _set_up_train_data(trainer: Trainer) -> bool:
    """Make the loaders that ``fit`` would make next, as ``estimated_stepping_batches`` does; whether there are any."""
    if trainer.state.fn != "fit":
        return False
    with random_states_kept():
        trainer.fit_loop.setup_data()
    return _has_train_data(trainer)


def _loss(
    before: Callable[[], None],
    loss_fn: LossFn | None,
    losses: list[torch.Tensor],
    backward: Callable[..., None],
    told: list[str],
    module: LightningModule,
    batch: Batch,
) -> torch.Tensor:
    """One loss of the step, or of ``loss_fn``.

    ``losses`` gets those that the step sends back by hand, ``told`` what the user was told.
    """
    before()
    losses.clear()
    if loss_fn is not None:
        with _Backward(backward):
            loss: object = loss_fn(module, batch)
        if not isinstance(loss, torch.Tensor):
            raise HawqError(f"loss_fn returned {type(loss).__name__}; it takes (module, batch) and returns the loss.")
        return loss
    step = module.training_step
    hint = "give HAWQ(measure=MeasureConfig(loss_fn=...)), a function of (module, batch) that returns the loss"
    if is_param_in_hook_signature(step, "dataloader_iter", explicit=True):
        raise HawqError(f"{type(module).__name__}.training_step takes dataloader_iter; {hint}.")
    args = (batch, 0) if is_param_in_hook_signature(step, "batch_idx", min_args=2) else (batch,)
    manual = not module.automatic_optimization
    needs = [(p, p.requires_grad) for p in module.parameters()] if manual else []
    expected: tuple[type[Exception], ...] = (
        AttributeError,
        *kinds("utilities.exceptions.MisconfigurationException", fabric=True),
    )
    spare = None if _has_train_data(module.trainer) else fresh_copy(args)

    def run(args: tuple[object, ...]) -> object:
        with manual_backward(module) if manual else _Backward(backward):
            return step(*args)

    try:
        try:
            out = run(args)
        except (TypeError, AttributeError) as error:  # len(self.trainer.train_dataloader): it is not there yet
            if spare is None or "NoneType" not in str(error) or not _set_up_train_data(module.trainer):
                raise
            out = run(spare)
    except LossCaptured as captured:
        if captured.read and not told:
            told.append("gradients")
            rank_zero_info(_READ.format(name=type(module).__name__))
        return captured.loss
    except expected as error:
        if isinstance(error, AttributeError) and not made_later(error, module):
            error.add_note(f"HAWQ runs training_step before training starts. If a later hook makes this: {hint}.")
            raise  # most likely the step's own mistake, which it would make in training as well
        raise HawqError(
            f"{type(module).__name__}.training_step reads what is not there before training starts ({error}); {hint}."
        ) from error
    except _MAYBE_EARLY as error:
        if not isinstance(error, HawqError):
            error.add_note(_EARLY.format(hint=hint))
        raise
    finally:
        for p, needed in needs:  # toggle_optimizer had its way with them
            p.requires_grad_(needed)
        if manual:
            module._param_requires_grad_state = {}
    if isinstance(out, Mapping):
        out = out.get("loss")
    if out is None and losses:  # Lightning skips the batch; the step has done the work
        out = losses[0]
    losses.clear()
    if out is None and not manual:
        raise SkippedBatch(f"{type(module).__name__}.training_step returns None, which skips the batch; {hint}.")
    if not isinstance(out, torch.Tensor):
        what = "optimizes by hand" if out is None else f"returns {type(out).__name__}"
        raise HawqError(f"{type(module).__name__}.training_step {what}; {hint}.")
    return out
