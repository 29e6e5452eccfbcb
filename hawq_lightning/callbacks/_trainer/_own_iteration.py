"""Loaders that finish their batches while they are iterated: what is read from them is what training would read."""

from __future__ import annotations

import copy
import inspect
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


def iterate_copy(loader: DataLoader[Batch], seed: int, workers: bool = False) -> Iterator[Batch]:
    """Iterate a copy of a loader; the loader itself is not moved on.

    The data set is shared, unless it is a stream: it may fill the memory.

    Args:
        loader: of any class.
        seed: of samplers that have a generator of their own.
        workers: as many processes as the loader has read, each with a copy of the data set; else this one does.
    """
    more: dict[str, Any] = {"num_workers": loader.num_workers, "timeout": loader.timeout} if workers else {}
    if isinstance(loader.dataset, IterableDataset):
        more["dataset"] = copied_stream(loader.dataset, "data set")
    else:
        more |= {n: copied_sampler(getattr(loader, n), seed) for n in ("sampler", "batch_sampler")}
    if workers or isinstance(loader.generator, torch.Generator):
        more["generator"] = torch.Generator().manual_seed(seed)
    return iter(_copy(loader, more))


def in_other_order(loader: DataLoader[Batch], order: Sequence[int]) -> DataLoader[Batch]:
    """A copy of such a loader that takes the data set's items in another order, where its batches are torch's own.

    Args:
        loader: one that :func:`iterates_itself`.
        order: of all items.
    """
    if type(loader.batch_sampler) is not BatchSampler or not loader.batch_size:
        return loader
    return _copy(loader, {"sampler": order, "batch_sampler": BatchSampler(order, loader.batch_size, False)})


def in_data_order(loader: DataLoader[Batch]) -> DataLoader[Batch]:
    """A copy of a loader that takes the items as they lie in the data set, as ``Trainer(overfit_batches=...)`` has it.

    Args:
        loader: of any class.
    """
    if isinstance(loader.dataset, IterableDataset):
        return loader
    order: SequentialSampler = SequentialSampler(loader.dataset)  # type: ignore[arg-type]
    batches = loader.batch_sampler
    if isinstance(batches, BatchSampler):
        batches = copy.copy(batches)
        batches.sampler = order
    elif loader.batch_size is not None:
        batches = BatchSampler(order, loader.batch_size, loader.drop_last)
    return _shallow(loader, {"sampler": order, "batch_sampler": batches})


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
    """A shallow copy, with iterators of its own, whose attributes ``more`` are others."""
    copied = _shallow(loader, {"num_workers": 0, "timeout": 0, "persistent_workers": False, **more})
    for name, value in vars(loader).items():  # loaders that keep one iterator for all epochs
        if isinstance(value, _BaseDataLoaderIter):
            vars(copied)[name] = None if name == "_iterator" else DataLoader.__iter__(copied)
    return copied


def _shallow(loader: DataLoader[Batch], more: dict[str, Any]) -> DataLoader[Batch]:
    copied = copy.copy(loader)
    own = vars(copied)  # DataLoader refuses new samplers by setattr
    own.update(more)
    if inspect.ismethod(loader.collate_fn) and loader.collate_fn.__self__ is loader:
        own["collate_fn"] = loader.collate_fn.__func__.__get__(copied)
    return copied
