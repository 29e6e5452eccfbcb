"""The first images that the Trainer's own train data would give, taken without leaving a trace."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from typing import Any, TypeAlias

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, SequentialSampler, default_collate

from hawq_lightning._config import MeasureConfig
from hawq_lightning._errors import HawqError
from hawq_lightning._types import Batch, BatchSizeFn, LossFn
from hawq_lightning.callbacks._trainer._copied_stream import copied_stream
from hawq_lightning.callbacks._trainer._epoch_length import foretell_epoch_length
from hawq_lightning.callbacks._trainer._namespaces import kinds, overrides
from hawq_lightning.callbacks._trainer._own_generators import own_generators_kept
from hawq_lightning.callbacks._trainer._own_iteration import (
    batches_in_order,
    copied_sampler,
    in_other_order,
    iterate_copy,
    iterates_itself,
)
from hawq_lightning.callbacks._trainer._skipped import SkippedBatch, without_skipped
from hawq_lightning.callbacks._trainer._transfer_hooks import hooks_leave_no_trace
from hawq_lightning.sensitivity import OnDevice, random_states_kept, seed_torch, to_device

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
    with random_states_kept(seed):
        loaders = _loaders(trainer)
        foretell_epoch_length(trainer, loaders)
        if isinstance(loaders, kinds("utilities.CombinedLoader")):
            loaders = loaders.iterables
        leaves, shape = tree_flatten(loaders) if isinstance(loaders, (dict, list, tuple)) else ([loaders], None)
        overfit = int(getattr(trainer, "overfit_batches", 0) or 0)
        with own_generators_kept(leaves):
            drawn = [_from_loader(x, images, seed, overfit, size_of) for x in leaves]
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
    with random_states_kept(seed):
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
        with own_generators_kept(loader):
            return _from_loader(loader, images, seed, 0, size_of)


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


def _from_loader(loader: Iterable[Batch], images: int, seed: int, overfit: int, size_of: BatchSizeFn) -> list[Batch]:
    if not isinstance(loader, DataLoader):
        if isinstance(loader, Sized) and len(loader) == 0:
            return []
        stream = iter(loader) if isinstance(loader, (list, tuple)) else iter(copied_stream(loader, "loader"))
        return _until(stream, images, size_of)
    if iterates_itself(loader):
        return _until(iterate_copy(loader, seed, overfit), images, size_of)
    if isinstance(loader.dataset, IterableDataset):
        fresh = DataLoader(
            copied_stream(loader.dataset, "data set"), batch_size=loader.batch_size, collate_fn=loader.collate_fn,
            drop_last=loader.drop_last,
        )  # fmt: skip
        return _until(iter(fresh), images, size_of)
    collate = loader.collate_fn or default_collate
    dataset = loader.dataset
    if loader.batch_size is None and loader.batch_sampler is None:
        indices = iter(copied_sampler(loader.sampler, seed))
        return _until((collate(_item(dataset, i, seed)) for i in indices), images, size_of)
    sampler: Iterable[Sequence[object]] | None = loader.batch_sampler
    if overfit:
        sampler = batches_in_order(loader)
    assert sampler is not None  # a loader has the one or the other
    lists: Iterator[Sequence[object]] = iter(copied_sampler(sampler, seed))
    if overfit:
        lists = itertools.islice(lists, overfit)
    return _until((collate(_items(dataset, ids, seed)) for ids in lists), images, size_of)


def _item(dataset: Dataset[Batch], index: object, seed: int) -> Batch:
    seed_torch(seed + 7919 * int(index) if isinstance(index, int) else seed)  # transforms: a seed an index
    return dataset[index]


def _items(dataset: Dataset[Batch], ids: Iterable[object], seed: int) -> list[Batch]:
    if hasattr(dataset, "__getitems__"):
        items: list[Batch] = dataset.__getitems__(list(ids))
        return items
    return [_item(dataset, i, seed) for i in ids]


def _until(stream: Iterator[Batch], images: int, size_of: BatchSizeFn) -> list[Batch]:
    out, count = [], 0
    for batch in stream:
        out.append(batch)
        count += size_of(batch)
        if count >= images:
            break
    return out


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
