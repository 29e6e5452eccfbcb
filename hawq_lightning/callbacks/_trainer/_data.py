"""The first images that the Trainer's own train data would give, taken without leaving a trace."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler

from hawq_lightning._config import MeasureConfig
from hawq_lightning._errors import HawqError
from hawq_lightning._types import Batch, BatchSizeFn, LossFn
from hawq_lightning.callbacks._trainer._data_state import data_of, data_state_kept
from hawq_lightning.callbacks._trainer._epoch_length import batches_to_overfit, foretell_epoch_length
from hawq_lightning.callbacks._trainer._namespaces import kinds, overrides
from hawq_lightning.callbacks._trainer._own_iteration import in_data_order, in_other_order, iterates_itself
from hawq_lightning.callbacks._trainer._read_loader import read_loader
from hawq_lightning.callbacks._trainer._skipped import SkippedBatch, without_skipped
from hawq_lightning.callbacks._trainer._transfer_hooks import hooks_leave_no_trace
from hawq_lightning.sensitivity import HeldAttributes, OnDevice, random_states_kept, to_device

_HOOKS = ("on_before_batch_transfer", "on_after_batch_transfer")
_TRIES = 2  # of eight times as many images each, while training_step skips them all
Loaders: TypeAlias = Any
"""A dataloader, or several in lists, tuples, dicts or a CombinedLoader."""


def draw_batches(trainer: Trainer, images: int, seed: int, size_of: BatchSizeFn) -> list[Batch]:
    """The first ``images`` images that the Trainer's own train data would give, in the user's batches.

    Transforms, sampler and collate function are the user's; loaders, generators, workers and random states stay
    untouched, so that training goes on as if nobody had looked. The same on every process.

    Args:
        trainer: whose train data are meant.
        images: at least so many, or all.
        seed: of random transforms and samplers.
        size_of: number of samples in a batch.

    Raises:
        HawqError: no train data, or it is empty.
    """
    with _nothing_moves(trainer, seed):
        loaders = _loaders(trainer)
        foretell_epoch_length(trainer, loaders)
        mode = "max_size_cycle"
        if isinstance(loaders, kinds("utilities.CombinedLoader")):
            mode, loaders = loaders._mode, loaders.iterables
        leaves, shape = tree_flatten(loaders) if isinstance(loaders, (dict, list, tuple)) else ([loaders], None)
        limits: Sequence[int | None] = [None] * len(leaves)
        if trainer.overfit_batches:  # type: ignore[attr-defined]
            leaves = _to_overfit(leaves)
            limits = batches_to_overfit(trainer, leaves, mode)
        drawn = [read_loader(x, images, seed, size_of, most) for x, most in zip(leaves, limits)]
        if None not in limits and mode == "max_size_cycle" and all(drawn):
            longest = max(map(len, drawn))
            drawn = [list(itertools.islice(itertools.cycle(of), longest)) for of in drawn]
        batches = drawn[0] if shape is None else [tree_unflatten(list(parts), shape) for parts in zip(*drawn)]
    if not batches:
        raise HawqError("The train dataloader is empty; there is nothing to measure on.")
    return batches


def _draw_validation(trainer: Trainer, images: int, seed: int, size_of: BatchSizeFn) -> list[Batch]:
    """Images of the first validation loader; none where there is none, or it is what was measured on.

    Such data often lie there class by class: they are drawn from all over, where the loader takes them in their order.
    """
    source = trainer.fit_loop.epoch_loop.val_loop._data_source
    if trainer.state.fn != "fit" or not source.is_defined() or trainer.limit_val_batches == 0:
        return []
    with _nothing_moves(trainer, seed):
        loaders = source.dataloader()
        leaves = tree_flatten(loaders)[0] if isinstance(loaders, (dict, list, tuple)) else [loaders]
        if not leaves or leaves[0] is None:
            return []
        loader = leaves[0]
        if (
            isinstance(loader, DataLoader)
            and isinstance(loader.sampler, SequentialSampler)
            and (size := loader.batch_size)
        ):
            order = torch.randperm(len(loader.sampler), generator=torch.Generator().manual_seed(seed)).tolist()
            if iterates_itself(loader):
                loader = in_other_order(loader, order)
            else:
                loader = DataLoader(
                    loader.dataset, batch_sampler=BatchSampler(order, size, False), collate_fn=loader.collate_fn,
                )  # fmt: skip
        return read_loader(loader, images, seed, size_of)


def _to_overfit(leaves: Sequence[Loaders]) -> list[Loaders]:
    """Loaders as Lightning makes them for ``overfit_batches``: all in the order of the data, if one is in another."""
    if all(isinstance(x.sampler, SequentialSampler) for x in leaves if hasattr(x, "sampler")):
        return list(leaves)
    return [in_data_order(x) if isinstance(x, DataLoader) else x for x in leaves]


@contextmanager
def _nothing_moves(trainer: Trainer, seed: int) -> Iterator[None]:
    """Random states, and what loaders and whoever makes them hold, are put back."""
    module = trainer.lightning_module
    attributes = HeldAttributes([module])
    try:
        with random_states_kept(seed), data_state_kept(*data_of(trainer), network=module):
            yield
    finally:
        attributes.put_back()


def _loaders(trainer: Trainer) -> Loaders:
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


def _train_data(trainer: Trainer) -> Loaders:
    source, data = trainer.fit_loop._data_source, getattr(trainer, "datamodule", None)
    try:
        return source.dataloader()
    except Exception:
        if data is None:
            raise
        data.setup("fit")  # it was set up for validation only
        return source.dataloader()


def held_out_batches(
    trainer: Trainer,
    pl_module: LightningModule,
    config: MeasureConfig,
    measured_on: OnDevice,
    validation: bool = True,
) -> tuple[OnDevice, OnDevice, str]:
    """Data to judge plans on, that no forecast has seen: validation data, or train data that are kept apart.

    Args:
        trainer: whose data are meant.
        pl_module: its module.
        config: images, seed, and how samples are counted.
        measured_on: what traces were measured on, as :func:`train_batches` gave it.
        validation: use validation data where there are any.

    Returns:
        batches to judge on, others to forecast on (a network is surer of what it was trained on, which makes its
        divergence smaller), and what the former are, in words.
    """
    size_of, images = config.samples, config.images
    drawn = _draw_validation(trainer, 2 * images, config.seed, size_of) if validation else []
    if drawn:
        held_out = onto_device(trainer, pl_module, drawn, size_of, config.seed)
        sizes = list(itertools.accumulate(held_out.samples(size_of)))
        enough = min(images, sizes[-1] * 3 / 4)
        judged = next(k + 1 for k, size in enumerate(sizes) if size >= enough)
        rest = held_out[judged:] if judged < len(sizes) else measured_on
        return held_out[:judged], rest, f"{sizes[judged - 1]} validation samples"
    seen = sum(measured_on.samples(size_of))
    seen = math.ceil(seen * measured_on.drawn / len(measured_on))  # with those that were left out
    drawn = draw_batches(trainer, seen + images, config.seed, size_of)[measured_on.drawn :]
    count, what, rest = len(measured_on), "train samples that nothing was measured on", measured_on
    if drawn:
        held_out = onto_device(trainer, pl_module, drawn, size_of, config.seed)
    elif count > 1:  # there are no more of them
        kept = max(1, count // 4)
        held_out, rest, what = measured_on[-kept:], measured_on[:-kept], "train samples that nothing was forecast from"
    else:
        held_out, what = measured_on, "samples, all that there are"
    return held_out, rest, f"{sum(held_out.samples(size_of))} {what}"


def train_batches(
    trainer: Trainer, pl_module: LightningModule, config: MeasureConfig, images: int, loss_fn: LossFn
) -> OnDevice:
    """The Trainer's own train data as :func:`draw_batches` gives them, to be moved as :func:`onto_device` says.

    Args:
        trainer: whose data are meant.
        pl_module: its module.
        config: seed, and how samples are counted.
        images: at least so many, or all.
        loss_fn: batches that it skips are left out, and more are drawn where it skips them all.

    Raises:
        HawqError: there are no train data, or ``loss_fn`` skips them all.
    """

    def draw(count: int) -> OnDevice:
        drawn = draw_batches(trainer, count, config.seed, config.samples)
        return onto_device(trainer, pl_module, drawn, config.samples, config.seed)

    batches = draw(images)
    for _ in range(_TRIES):
        try:
            return without_skipped(pl_module, batches, loss_fn, config)
        except SkippedBatch:
            before, batches = batches, draw(8 * sum(batches.samples(config.samples)))
            if len(batches) == len(before):
                raise
    return without_skipped(pl_module, batches, loss_fn, config)


def onto_device(
    trainer: Trainer, pl_module: LightningModule, batches: Sequence[Batch], size_of: BatchSizeFn, seed: int
) -> OnDevice:
    """Batches that the Trainer moves, one at a time, when they are asked for.

    What the hooks before and after a transfer make of a batch is made once, as in training, and kept.

    Args:
        trainer: that moves them.
        pl_module: its module, with hooks.
        batches: as they were drawn.
        size_of: number of samples in a batch.
        seed: of what hooks draw.
    """
    strategy = trainer.strategy
    owners = [pl_module, *([trainer.datamodule] if getattr(trainer, "datamodule", None) is not None else [])]  # type: ignore[attr-defined]
    kept = [trainer.precision_plugin.convert_input(batch) for batch in batches]
    moves_itself = any(overrides("transfer_batch_to_device", owner) for owner in owners)

    def quiet(move: Callable[[Batch], Batch]) -> Callable[[Batch], Batch]:
        def moved(batch: Batch) -> Batch:
            with hooks_leave_no_trace(pl_module, seed):
                return move(batch)

        return moved if moves_itself else move

    if not any(overrides(hook, owner) for hook in _HOOKS for owner in owners):
        return OnDevice(kept, quiet(lambda batch: strategy.batch_to_device(batch, dataloader_idx=0)), size_of)
    home = torch.device("cpu")
    for number, batch in enumerate(kept):
        with hooks_leave_no_trace(pl_module, seed + number):
            batch = pl_module._on_before_batch_transfer(batch, dataloader_idx=0)
            batch = strategy.batch_to_device(batch, dataloader_idx=0)
        kept[number] = batch if strategy.root_device == home else to_device(batch, home)
    return OnDevice(
        kept,
        quiet(lambda batch: pl_module._call_batch_hook("transfer_batch_to_device", batch, strategy.root_device, 0)),
        size_of,
    )
