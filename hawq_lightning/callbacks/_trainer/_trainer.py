"""What the Trainer is and does: strategies, hooks' order, other callbacks, signals, progress."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from hawq_lightning._errors import HawqError
from hawq_lightning._loss_graph import Trained, trainable
from hawq_lightning._types import Batch, StateDict
from hawq_lightning.callbacks._trainer._namespaces import kinds, overrides
from hawq_lightning.sensitivity import ProcessShard

_SHARDED = ("FSDPStrategy", "DeepSpeedStrategy", "ModelParallelStrategy")


def is_sharded(trainer: Trainer) -> str:
    """The name of a strategy that splits parameters over processes, or nothing."""
    names = [kind.__name__ for kind in type(trainer.strategy).__mro__]
    return next((name for name in _SHARDED if name in names), "")


def refuse_sharded(trainer: Trainer) -> None:
    """Measuring needs whole layers.

    Raises:
        HawqError: the strategy splits parameters over processes.
    """
    if name := is_sharded(trainer):
        raise HawqError(
            f"{name} splits the layers, so traces cannot be measured under it: run hawq-lightning-analyze "
            "(or fit on one device) first and give HAWQ(plan='.../plan.json')."
        )


def optimized(trainer: Trainer) -> list[torch.Tensor]:
    """What the Trainer's optimizers hold."""
    return [p for optimizer in trainer.optimizers for group in optimizer.param_groups for p in group["params"]]


def trained_by(trainer: Trainer, pl_module: LightningModule) -> Trained:
    """The parameters that the Trainer's optimizers hold; while there are none, those that want gradients."""
    held, wanted = {id(p) for p in optimized(trainer)}, trainable(pl_module)
    return Trained(wanted & held or wanted, other_losses=not pl_module.automatic_optimization)


def shard_of(trainer: Trainer) -> ProcessShard:
    """This process's part of a measurement; tables are added over processes."""
    if trainer.world_size == 1:
        return ProcessShard()

    def all_reduce_sum(table: torch.Tensor) -> torch.Tensor:
        total = table.to(trainer.strategy.root_device)
        total = trainer.strategy.reduce(total, reduce_op="sum")
        return total.cpu()

    return ProcessShard(trainer.global_rank, trainer.world_size, all_reduce_sum)


def builds_later(pl_module: LightningModule) -> bool:
    """Whether a hook that builds layers (``setup`` or ``configure_model``) may come after ours."""
    return any(overrides(name, pl_module) for name in ("setup", "configure_model"))


def after_layers_exist(pl_module: LightningModule, prepare: Callable[[], object]) -> None:
    """Call ``prepare`` again after ``setup`` and ``configure_model`` of a module that builds layers there."""
    for name in ("setup", "configure_model"):
        if not overrides(name, pl_module) or name in pl_module.__dict__:
            continue
        original = getattr(pl_module, name)

        def once(
            *args: object, _name: str = name, _original: Callable[..., object] = original, **kwargs: object
        ) -> object:
            pl_module.__dict__.pop(_name, None)
            out = _original(*args, **kwargs)
            prepare()
            return out

        pl_module.__dict__[name] = functools.wraps(original)(once)


def move_to_front(trainer: Trainer, callback: Callback) -> list[Callback]:
    """Move ``callback`` to the front, so that tuners see the quantized model; returns who stood before it."""
    listed = trainer.callbacks  # type: ignore[attr-defined]
    before = list(itertools.takewhile(lambda c: c is not callback, listed))
    trainer.callbacks = [callback, *(c for c in listed if c is not callback)]  # type: ignore[attr-defined]
    return before


def rerun_setup(before: list[Callback], trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
    """Averaging callbacks that copied the model before it had quantizers copy it again."""
    averaging = (*kinds("callbacks.WeightAveraging"), *kinds("callbacks.StochasticWeightAveraging"))
    for callback in before:
        if isinstance(callback, averaging):
            callback.setup(trainer, pl_module, stage)


def sync_averages(trainer: Trainer, pl_module: LightningModule, weights: bool = False) -> None:
    """Enable the quantizers in the copies of averaging callbacks; with ``weights`` their averages begin anew too."""
    state = {k: v for k, v in pl_module.state_dict().items() if weights or "_quantizer." in k}
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        average = getattr(callback, "_average_model", None)
        if average is not None:
            target = getattr(average, "module", average)
            target.load_state_dict(state, strict=False)


@contextmanager
def signal_handlers(trainer: Trainer) -> Iterator[None]:
    """Lightning's handlers (SLURM's requeue), which it registers after ``on_fit_start``: until then a notice kills."""
    connector = trainer._signal_connector
    if connector._original_handlers:
        yield
        return
    connector.register_signal_handlers()
    try:
        yield
    finally:
        connector.teardown()


def restore_progress(trainer: Trainer) -> None:
    """In ``on_fit_start`` loops and optimizers are not yet those of the checkpoint; one written now would lose them."""
    if trainer._checkpoint_connector._loaded_checkpoint:
        trainer._checkpoint_connector.restore_training_state()


def at_epoch_end(trainer: Trainer) -> bool:
    """Whether a checkpoint written now resumes at the start of an epoch."""
    progress = trainer.fit_loop.epoch_loop.batch_progress
    return progress.is_last_batch or progress.current.ready == 0


def in_middle_of_epoch(checkpoint: StateDict) -> bool:
    """Whether a fit from this checkpoint goes on within an epoch."""
    loop = checkpoint.get("loops", {}).get("fit_loop", {})
    progress = loop.get("epoch_loop.batch_progress", {})
    return bool(progress) and not progress["is_last_batch"] and progress["current"]["ready"] > 0


def after_last_batch(checkpoint: StateDict) -> bool:
    """Whether a fit from this checkpoint goes on behind the last batch of an epoch that does not count as over yet.

    ``ModelCheckpoint(save_on_train_epoch_end=False)`` writes such ones, at the end of validation.
    """
    loop = checkpoint.get("loops", {}).get("fit_loop", {})
    epoch, batch = (loop.get(n, {}) for n in ("epoch_progress", "epoch_loop.batch_progress"))
    if not epoch or not batch:
        return False
    current = batch["current"]
    over = batch["is_last_batch"] and current["completed"] == current["processed"]
    return bool(over and epoch["current"]["processed"] < epoch["current"]["started"])


def train_loaders(trainer: Trainer) -> list[Iterable[Batch]]:
    """The train dataloaders, once the Trainer has them."""
    combined = trainer.fit_loop._combined_loader
    return [] if combined is None else list(combined.flattened)


def renew_train_iterator(trainer: Trainer) -> None:
    """Begin the epoch's data anew if they stand already: ``estimated_stepping_batches`` in a schedule sees to that."""
    fetcher = trainer.fit_loop._data_fetcher
    if fetcher is not None:
        iter(fetcher)


def gathered(trainer: Trainer, state: StateDict) -> StateDict:
    """What a single process says, or ``{"ranks": [...]}`` of several."""
    if trainer.world_size == 1 or not torch.distributed.is_initialized():
        return state
    everyone: list[StateDict | None] = [None] * trainer.world_size
    torch.distributed.all_gather_object(everyone, state)
    return {"ranks": everyone}


def has_parent(trainer: Trainer) -> bool:
    """Whether the user's own process waits for this one (spawn and fork), and learns by files what it measured."""
    return isinstance(trainer.strategy.launcher, kinds("strategies.launchers.multiprocessing._MultiProcessingLauncher"))


def shows_progress(trainer: Trainer) -> bool:
    """Whether the Trainer shows a progress bar, and this process is the one to show it."""
    return trainer.is_global_zero and trainer.progress_bar_callback is not None


def runs_script_again(trainer: Trainer) -> bool:
    """Whether the Trainer starts its other processes by running the whole program once more for each."""
    return trainer.world_size > 1 and isinstance(
        trainer.strategy.launcher, kinds("strategies.launchers._SubprocessScriptLauncher")
    )


def insert_after(trainer: Trainer, callback: Callback, extra_callbacks: Sequence[Callback]) -> None:
    """Move ``extra_callbacks`` right behind ``callback`` in the Trainer's list."""
    listed = [c for c in trainer.callbacks if not any(c is other for other in extra_callbacks)]  # type: ignore[attr-defined]
    place = next((i + 1 for i, c in enumerate(listed) if c is callback), 0)
    trainer.callbacks = [*listed[:place], *extra_callbacks, *listed[place:]]  # type: ignore[attr-defined]
