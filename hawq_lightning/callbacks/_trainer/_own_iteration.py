"""Loaders that finish their batches while they are iterated: what is read from them is what training would read."""

from __future__ import annotations

import copy
import inspect
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, SequentialSampler
from torch.utils.data.dataloader import _BaseDataLoaderIter

from hawq_lightning._types import Batch
from hawq_lightning.callbacks._trainer._copied_stream import copied_stream


def iterates_itself(loader: DataLoader[Batch]) -> bool:
    """Whether batches are more than data set, sampler and collate function: the loader's class has its own iteration.

    Args:
        loader: of any class.
    """
    kind = type(loader)
    return kind.__iter__ is not DataLoader.__iter__ or kind._get_iterator is not DataLoader._get_iterator


def iterate_copy(loader: DataLoader[Batch], seed: int, overfit: int) -> Iterator[Batch]:
    """Iterate a copy of such a loader, in this process; the loader itself is not moved on.

    The data set is shared, unless it is a stream: it may fill the memory.

    Args:
        loader: one that :func:`iterates_itself`.
        seed: of samplers that have a generator of their own.
        overfit: so many batches in the order of the data set, as ``Trainer(overfit_batches=...)`` takes them; 0: all,
            in the loader's order.
    """
    more: dict[str, Any] = {}
    if isinstance(loader.dataset, IterableDataset):
        more["dataset"] = copied_stream(loader.dataset, "data set")
    elif overfit and loader.batch_sampler is not None:
        more["batch_sampler"] = batches_in_order(loader)
        more["sampler"] = more["batch_sampler"].sampler
    else:
        more = {n: copied_sampler(getattr(loader, n), seed) for n in ("sampler", "batch_sampler")}
    if isinstance(loader.generator, torch.Generator):
        more["generator"] = torch.Generator().manual_seed(seed)
    batches = iter(_copy(loader, more))
    return itertools.islice(batches, overfit) if overfit else batches


def in_other_order(loader: DataLoader[Batch], order: Sequence[int]) -> DataLoader[Batch]:
    """A copy of such a loader that takes the data set's items in another order, where its batches are torch's own.

    Args:
        loader: one that :func:`iterates_itself`.
        order: of all items.
    """
    if type(loader.batch_sampler) is not BatchSampler or not loader.batch_size:
        return loader
    return _copy(loader, {"sampler": order, "batch_sampler": BatchSampler(order, loader.batch_size, False)})


def batches_in_order(loader: DataLoader[Batch]) -> BatchSampler:
    """Indices in the order of the data set, as ``Trainer(overfit_batches=...)`` takes them.

    Args:
        loader: of batches.
    """
    return BatchSampler(SequentialSampler(loader.dataset), loader.batch_size or 1, False)  # type: ignore[arg-type]


def copied_sampler(sampler: Iterable[Any] | None, seed: int) -> Any:
    """A shallow copy of a sampler, with a generator of its own where the original has one.

    Args:
        sampler: of items or of batches, which may hold one of items.
        seed: of the generator.
    """
    copied: Any = copy.copy(sampler)
    if isinstance(getattr(copied, "generator", None), torch.Generator):
        copied.generator = torch.Generator().manual_seed(seed)
    inner = getattr(copied, "sampler", None)
    if inner is not None and inner is not sampler:
        inner = copy.copy(inner)
        if isinstance(getattr(inner, "generator", None), torch.Generator):
            inner.generator = torch.Generator().manual_seed(seed)
        copied.sampler = inner
    return copied


def _copy(loader: DataLoader[Batch], more: dict[str, Any]) -> DataLoader[Batch]:
    """A shallow copy without workers, whose attributes ``more`` are others."""
    copied = copy.copy(loader)
    own = vars(copied)  # DataLoader refuses new samplers by setattr
    own.update(more, num_workers=0, timeout=0)
    if inspect.ismethod(loader.collate_fn) and loader.collate_fn.__self__ is loader:
        own["collate_fn"] = loader.collate_fn.__func__.__get__(copied)
    for name, value in vars(loader).items():  # loaders that keep one iterator for all epochs
        if isinstance(value, _BaseDataLoaderIter):
            own[name] = None if name == "_iterator" else DataLoader.__iter__(copied)
    return copied
