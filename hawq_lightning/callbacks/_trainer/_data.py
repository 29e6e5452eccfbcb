"""The first images that the Trainer's own train data would give, taken without leaving a trace."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import CombinedLoader, rank_zero_info
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.data import DataLoader, Dataset, IterableDataset, SequentialSampler, default_collate

from hawq_lightning._batches import batch_images
from hawq_lightning._errors import HawqError
from hawq_lightning.sensitivity import random_states_kept


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
