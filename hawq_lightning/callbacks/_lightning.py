"""The one file that touches Lightning's internals: its data, its `training_step`, its hooks' order.

Tested with lightning 2.6; every private name that the package uses is used here.
"""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher
from lightning.pytorch.strategies.launchers.multiprocessing import _MultiProcessingLauncher
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.data import DataLoader, Dataset, IterableDataset, SequentialSampler, default_collate
from torchmetrics import Metric

from hawq_lightning.batches import batch_images
from hawq_lightning.callbacks.checkpoint_io import AtomicCheckpointIO
from hawq_lightning.errors import HawqError
from hawq_lightning.sensitivity.measure import Share
from hawq_lightning.sensitivity.quiet import random_states_kept

_SHARDED = ("FSDPStrategy", "DeepSpeedStrategy", "ModelParallelStrategy")


# ---------------------------------------------------------------- data


def draw_batches(trainer: Trainer, images: int, seed: int) -> list[Any]:
    """The first ``images`` images that the Trainer's own train data would give, in the user's batches.

    Transforms, sampler and collate function are the user's; loaders, generators, workers and random states stay
    untouched, so that training goes on as if nobody had looked. The same on every process.

    Raises:
        HawqError: no train data, or it is empty.
    """
    with random_states_kept(seed):
        loaders = _loaders(trainer)
        if isinstance(loaders, CombinedLoader):
            loaders = loaders.iterables
        leaves, shape = tree_flatten(loaders) if isinstance(loaders, (dict, list, tuple)) else ([loaders], None)
        overfit = int(getattr(trainer, "overfit_batches", 0) or 0)
        drawn = [_from_loader(x, images, seed, overfit) for x in leaves]
        batches = drawn[0] if shape is None else [tree_unflatten(list(parts), shape) for parts in zip(*drawn)]
    if not batches:
        raise HawqError("The train dataloader is empty; there is nothing to measure on.")
    return batches


def _loaders(trainer: Trainer) -> Any:
    source = trainer.fit_loop._data_source
    if trainer.state.fn == "fit":
        if not source.is_defined():
            raise HawqError("The Trainer has no train dataloader to measure on; pass one to fit().")
        return source.dataloader()
    try:  # trainer.validate: a datamodule may have train data all the same
        if source.is_defined() and (loaders := _train_data(trainer)):
            return loaders
    except Exception as error:
        rank_zero_info(f"HAWQ: the train data cannot be had here ({error}).")
    rank_zero_info("HAWQ: measures on the validation data, since there is no train data.")
    return trainer.validate_loop._data_source.dataloader()


def _train_data(trainer: Trainer) -> Any:
    source, data = trainer.fit_loop._data_source, getattr(trainer, "datamodule", None)
    try:
        return source.dataloader()
    except Exception:
        if data is None:
            raise
        data.setup("fit")  # it was set up for validation only
        return source.dataloader()


def _from_loader(loader: Any, images: int, seed: int, overfit: int) -> list[Any]:
    if not isinstance(loader, DataLoader):
        if hasattr(loader, "__len__") and len(loader) == 0:
            return []
        stream = iter(loader) if isinstance(loader, (list, tuple)) else iter(copy.deepcopy(loader))
        return _until(stream, images)
    if isinstance(loader.dataset, IterableDataset):
        own = DataLoader(
            copy.deepcopy(loader.dataset), batch_size=loader.batch_size, collate_fn=loader.collate_fn,
            drop_last=loader.drop_last,
        )  # fmt: skip
        return _until(iter(own), images)
    collate = loader.collate_fn or default_collate
    dataset = loader.dataset
    if loader.batch_size is None and loader.batch_sampler is None:
        indices = (i for i in _own_sampler(loader.sampler, seed))
        return _until((collate(_item(dataset, i, seed)) for i in indices), images)
    sampler = loader.batch_sampler
    if overfit:
        sampler = torch.utils.data.BatchSampler(SequentialSampler(dataset), loader.batch_size or 1, False)  # type: ignore[arg-type]
    lists = _own_sampler(sampler, seed)
    if overfit:
        lists = itertools.islice(lists, overfit)
    return _until((collate(_items(dataset, ids, seed)) for ids in lists), images)


def _own_sampler(sampler: Any, seed: int) -> Iterator[Any]:
    """Iterate a shallow copy of a sampler, with a generator of its own where the original has one."""
    own = copy.copy(sampler)
    if isinstance(getattr(own, "generator", None), torch.Generator):
        own.generator = torch.Generator().manual_seed(seed)
    inner = getattr(own, "sampler", None)
    if inner is not None and inner is not sampler:
        inner = copy.copy(inner)
        if isinstance(getattr(inner, "generator", None), torch.Generator):
            inner.generator = torch.Generator().manual_seed(seed)
        own.sampler = inner
    return iter(own)


def _item(dataset: Dataset[Any], index: Any, seed: int) -> Any:
    torch.manual_seed(seed + 7919 * int(index) if isinstance(index, int) else seed)  # transforms: a seed an index
    return dataset[index]


def _items(dataset: Dataset[Any], ids: Any, seed: int) -> Any:
    if hasattr(dataset, "__getitems__"):
        return dataset.__getitems__(list(ids))
    return [_item(dataset, i, seed) for i in ids]


def _until(stream: Iterator[Any], images: int) -> list[Any]:
    out, count = [], 0
    for batch in stream:
        out.append(batch)
        count += batch_images(batch)
        if count >= images:
            break
    return out


def onto_device(trainer: Trainer, pl_module: LightningModule, batches: list[Any]) -> list[Any]:
    """Move batches as the Trainer would, with the module's own transfer hooks."""
    out = []
    for batch in batches:
        batch = trainer.precision_plugin.convert_input(batch)
        batch = pl_module._on_before_batch_transfer(batch, dataloader_idx=0)
        out.append(trainer.strategy.batch_to_device(batch, dataloader_idx=0))
    return out


# ---------------------------------------------------------------- training_step


class _LossFound(BaseException):
    """Carries the loss out of a step that optimizes by hand."""

    def __init__(self, loss: torch.Tensor) -> None:
        self.loss = loss


@contextmanager
def borrowed_step(
    trainer: Trainer,
    pl_module: LightningModule,
    loss_fn: Callable[..., Any] | None = None,
    before: Callable[[], None] = lambda: None,
) -> Iterator[Callable[[Any, Any], torch.Tensor]]:
    """Lend ``training_step`` (or the user's ``loss_fn``) as ``loss(module, batch)``; afterwards nothing has changed.

    ``before`` is called before every loss, and may raise.

    Logging is muted; metrics, counters, lists and modes of every submodule are put back.
    """
    stage, loggers, hook = trainer.state.stage, trainer.loggers, pl_module._current_fx_name
    modules = list(pl_module.modules())
    modes = [(m, m.training) for m in modules]
    kept = [(m, _snapshot(m)) for m in modules]
    muted = {name: lambda *a, **k: None for name in ("log", "log_dict")}
    manual = loss_fn is None and not pl_module.automatic_optimization
    tensor_backward = torch.Tensor.backward
    try:
        trainer.training = True
        trainer.loggers = [DummyLogger()] if loggers else []
        pl_module._current_fx_name = "training_step"
        pl_module.__dict__.update(muted)
        for m in modules:
            if isinstance(m, Metric):
                m.dist_sync_on_step = False  # ranks hold unequal numbers of batches
                m.sync_on_compute = False
        if manual:
            pl_module.__dict__["manual_backward"] = _found
            torch.Tensor.backward = lambda self, *a, **k: _found(self)  # type: ignore[assignment, method-assign]
        yield functools.partial(_loss, before, loss_fn)
    finally:
        torch.Tensor.backward = tensor_backward  # type: ignore[method-assign]
        for name in (*muted, "manual_backward"):
            pl_module.__dict__.pop(name, None)
        for m, snapshot in kept:
            _put_back(m, snapshot)
        for m, mode in modes:
            m.training = mode
        pl_module._current_fx_name = hook
        trainer.loggers = loggers
        trainer.state.stage = stage


def _found(loss: torch.Tensor, *args: Any, **kwargs: Any) -> None:
    raise _LossFound(loss)


def _loss(before: Callable[[], None], loss_fn: Callable[..., Any] | None, module: Any, batch: Any) -> torch.Tensor:
    before()
    if loss_fn is not None:
        out = loss_fn(module, batch)
        if not isinstance(out, torch.Tensor):
            raise HawqError(f"loss_fn returned {type(out).__name__}; it takes (module, batch) and returns the loss.")
        return out
    step = module.training_step
    hint = "give HAWQ(loss_fn=...), a function of (module, batch) that returns the loss"
    if is_param_in_hook_signature(step, "dataloader_iter", explicit=True):
        raise HawqError(f"{type(module).__name__}.training_step takes dataloader_iter; {hint}.")
    args = (batch, 0) if is_param_in_hook_signature(step, "batch_idx", min_args=2) else (batch,)
    manual = not module.automatic_optimization
    needs = [(p, p.requires_grad) for p in module.parameters()] if manual else []
    try:
        out = step(*args)
    except _LossFound as found:
        return found.loss
    except (AttributeError, MisconfigurationException) as error:  # what it reads is made by a later hook
        raise HawqError(
            f"{type(module).__name__}.training_step cannot run before training starts ({error}); {hint}."
        ) from error
    finally:
        for p, needed in needs:  # toggle_optimizer had its way with them
            p.requires_grad_(needed)
        if manual:
            module._param_requires_grad_state = {}
    if isinstance(out, Mapping):
        out = out.get("loss")
    if not isinstance(out, torch.Tensor):
        what = "skips the batch or optimizes by hand" if out is None else f"returns {type(out).__name__}"
        raise HawqError(f"{type(module).__name__}.training_step {what}; {hint}.")
    return out


_INTERNAL = {"training", "_parameters", "_buffers", "_modules", "_trainer", "_fabric", "trainer"}


def _snapshot(module: Any) -> dict[str, tuple[Any, Any]]:
    """Plain attributes of a module: the object, and a copy of what it held."""
    out = {}
    states = getattr(module, "_defaults", {}) if isinstance(module, Metric) else {}
    for name, value in module.__dict__.items():
        if name in _INTERNAL or name.endswith("_hooks") or "_hooks_" in name:
            continue
        if name in states or isinstance(value, torch.Tensor):
            out[name] = (value, _copied(value))
        elif isinstance(value, (list, dict, set)):
            out[name] = (value, _Container(value))
        else:
            out[name] = (value, None)
    return out


class _Container:
    """What a list, dict or set holds, and the ones in it hold, put back in place: others may point at them."""

    def __init__(self, value: Any) -> None:
        self._parts: list[tuple[Any, Any]] = []
        self._note(value, set())

    def _note(self, value: Any, seen: set[int]) -> None:
        if isinstance(value, (list, dict, set)) and id(value) not in seen:
            seen.add(id(value))
            self._parts.append((value, copy.copy(value)))
            if not isinstance(value, set):
                for inner in value.values() if isinstance(value, dict) else value:
                    self._note(inner, seen)

    def put_back(self) -> None:
        for value, held in self._parts:
            if isinstance(value, list):
                value[:] = held
            else:
                value.clear()
                value.update(held)


def _copied(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    return [v.detach().clone() for v in value] if isinstance(value, list) else copy.copy(value)


def _put_back(module: Any, snapshot: dict[str, tuple[Any, Any]]) -> None:
    for name in [n for n in module.__dict__ if n not in snapshot and n not in _INTERNAL and "_hooks" not in n]:
        del module.__dict__[name]
    for name, (value, held) in snapshot.items():
        if isinstance(value, torch.Tensor) and value.is_inference():
            value = held  # a metric's state after trainer.validate cannot be written to
        elif isinstance(value, torch.Tensor):
            with torch.no_grad():
                value.copy_(held) if value.shape == held.shape else None
        elif isinstance(held, _Container):
            held.put_back()
        elif isinstance(value, list):
            value[:] = held
        module.__dict__[name] = value


# ---------------------------------------------------------------- hooks and company


def check_namespace(trainer: Any) -> None:
    """Lightning has two names, whose classes are not each other's.

    Raises:
        HawqError: the Trainer is ``pytorch_lightning``'s.
    """
    if not isinstance(trainer, Trainer):
        raise HawqError(
            f"HAWQ is a callback for lightning.pytorch, and this Trainer comes from {type(trainer).__module__}: write "
            "'import lightning.pytorch as pl' in the place of 'import pytorch_lightning as pl' (the same code)."
        )


def is_sharded(trainer: Trainer) -> str:
    """The name of a strategy that splits parameters over processes, or nothing."""
    names = [kind.__name__ for kind in type(trainer.strategy).__mro__]
    return next((name for name in _SHARDED if name in names), "")


def write_checkpoints_atomically(trainer: Trainer) -> None:
    """Unless the strategy or the user has a way of their own: see :class:`AtomicCheckpointIO`."""
    if not is_sharded(trainer) and type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
        trainer.strategy.checkpoint_io = AtomicCheckpointIO()


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


def share_of(trainer: Trainer) -> Share:
    """This process's part of a measurement; tables are added over processes."""
    if trainer.world_size == 1:
        return Share()

    def all_sum(table: torch.Tensor) -> torch.Tensor:
        total = table.to(trainer.strategy.root_device)
        total = trainer.strategy.reduce(total, reduce_op="sum")  # type: ignore[assignment]
        return total.cpu()

    return Share(trainer.global_rank, trainer.world_size, all_sum)


def builds_later(pl_module: LightningModule) -> bool:
    """Whether a hook that builds layers (``setup`` or ``configure_model``) may come after ours."""
    return any(is_overridden(name, pl_module) for name in ("setup", "configure_model"))


def after_layers_exist(pl_module: LightningModule, install: Callable[[], Any]) -> None:
    """Call ``install`` again after ``setup`` and ``configure_model`` of a module that builds layers there."""
    for name in ("setup", "configure_model"):
        if not is_overridden(name, pl_module) or name in pl_module.__dict__:
            continue
        original = getattr(pl_module, name)

        def once(*args: Any, _name: str = name, _original: Any = original, **kwargs: Any) -> Any:
            pl_module.__dict__.pop(_name, None)
            out = _original(*args, **kwargs)
            install()
            return out

        pl_module.__dict__[name] = functools.wraps(original)(once)


def go_first(trainer: Trainer, callback: Callback) -> list[Callback]:
    """Move ``callback`` to the front, so that tuners see the quantized model; returns who stood before it."""
    listed = trainer.callbacks  # type: ignore[attr-defined]
    before = list(itertools.takewhile(lambda c: c is not callback, listed))
    trainer.callbacks = [callback, *(c for c in listed if c is not callback)]  # type: ignore[attr-defined]
    return before


def copy_again(before: list[Callback], trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
    """Averaging callbacks that copied the model before it had quantizers copy it again."""
    for callback in before:
        if isinstance(callback, (WeightAveraging, StochasticWeightAveraging)):
            callback.setup(trainer, pl_module, stage)


def sync_averages(trainer: Trainer, pl_module: LightningModule) -> None:
    """Arm the copies that averaging callbacks hold."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        average = getattr(callback, "_average_model", None)
        if average is not None:
            target = getattr(average, "module", average)
            target.load_state_dict(pl_module.state_dict())


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


def in_middle_of_epoch(checkpoint: Mapping[str, Any]) -> bool:
    """Whether a fit from this checkpoint goes on within an epoch."""
    loop = checkpoint.get("loops", {}).get("fit_loop", {})
    progress = loop.get("epoch_loop.batch_progress", {})
    return bool(progress) and not progress["is_last_batch"] and progress["current"]["ready"] > 0


def train_loaders(trainer: Trainer) -> list[Any]:
    """The train dataloaders, once the Trainer has them."""
    combined = trainer.fit_loop._combined_loader
    return [] if combined is None else list(combined.flattened)


def renew_train_iterator(trainer: Trainer) -> None:
    """Begin the epoch's data anew if they stand already: ``estimated_stepping_batches`` in a schedule sees to that."""
    fetcher = trainer.fit_loop._data_fetcher
    if fetcher is not None:
        iter(fetcher)


def gathered(trainer: Trainer, mine: dict[str, Any]) -> dict[str, Any]:
    """What a single process says, or ``{"ranks": [...]}`` of several."""
    if trainer.world_size == 1 or not torch.distributed.is_initialized():
        return mine
    everyone: list[Any] = [None] * trainer.world_size
    torch.distributed.all_gather_object(everyone, mine)
    return {"ranks": everyone}


def has_parent(trainer: Trainer) -> bool:
    """Whether the user's own process waits for this one (spawn and fork), and learns by files what it found."""
    return isinstance(trainer.strategy.launcher, _MultiProcessingLauncher)


def shows_progress(trainer: Trainer) -> bool:
    """Whether the Trainer shows a progress bar, and this process is the one to show it."""
    return trainer.is_global_zero and trainer.progress_bar_callback is not None


def runs_script_again(trainer: Trainer) -> bool:
    """Whether the Trainer starts its other processes by running the whole program once more for each."""
    return trainer.world_size > 1 and isinstance(trainer.strategy.launcher, _SubprocessScriptLauncher)


# ---------------------------------------------------------------- a step of one's own


def float_copy(pl_module: LightningModule) -> LightningModule:
    """A copy of the module as it is, apart from the Trainer, that logs nothing and carries no gradients.

    Raises:
        HawqError: something in it cannot be copied.
    """
    grads = [(p, p.grad) for p in pl_module.parameters()]
    try:
        for p, _ in grads:
            p.grad = None
        twin = copy.deepcopy(pl_module)
    except Exception as error:
        raise HawqError(f"{type(pl_module).__name__} cannot be copied for distillation: {error}.") from error
    finally:
        for p, grad in grads:
            p.grad = grad
    twin.requires_grad_(False)
    for module in twin.modules():
        if isinstance(module, LightningModule):
            module.__dict__.pop("training_step", None)  # what was put there belongs to the original
            module.__dict__.update({name: lambda *a, **k: None for name in ("log", "log_dict")})
        if isinstance(module, Metric):
            module.dist_sync_on_step = False
    return twin


_STEP = "_hawq_lightning_step"


def replaced_step(pl_module: LightningModule, around: Callable[..., Any]) -> None:
    """Let ``around(step, pl_module, *args)`` run in the place of ``training_step``; doing it twice is no harm."""
    if _STEP in pl_module.__dict__:
        return
    own = pl_module.__dict__.get("training_step")  # torch.compile puts one there
    step = pl_module.training_step
    pl_module.__dict__[_STEP] = own

    @functools.wraps(step)
    def replacement(*args: Any, **kwargs: Any) -> Any:
        return around(step, pl_module, *args, **kwargs)

    pl_module.__dict__["training_step"] = replacement


def restored_step(pl_module: LightningModule) -> None:
    """Undo :func:`replaced_step`."""
    if _STEP not in pl_module.__dict__:
        return
    own = pl_module.__dict__.pop(_STEP)
    pl_module.__dict__.pop("training_step", None)
    if own is not None:
        pl_module.__dict__["training_step"] = own


def loss_of(output: Any) -> torch.Tensor | None:
    """The loss that a training step returned; ``None``: it skips the batch."""
    loss = output.get("loss") if isinstance(output, Mapping) else output
    return loss if isinstance(loss, torch.Tensor) else None


def with_loss(output: Any, loss: torch.Tensor) -> Any:
    """What a training step returned, with another loss."""
    return {**output, "loss": loss} if isinstance(output, Mapping) else loss


def beside(trainer: Trainer, callback: Callback, companions: list[Callback]) -> None:
    """List ``companions`` right behind ``callback`` in the Trainer, once."""
    listed = [c for c in trainer.callbacks if not any(c is other for other in companions)]  # type: ignore[attr-defined]
    place = next((i + 1 for i, c in enumerate(listed) if c is callback), 0)
    trainer.callbacks = [*listed[:place], *companions, *listed[place:]]  # type: ignore[attr-defined]
