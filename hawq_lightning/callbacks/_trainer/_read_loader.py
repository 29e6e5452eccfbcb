"""The first batches of a loader, read in this process, or by workers where data can be read by them alone."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence, Sized

from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate

from hawq_lightning._errors import HawqError
from hawq_lightning._types import Batch, BatchSizeFn
from hawq_lightning.callbacks._trainer._copied_stream import copied_stream
from hawq_lightning.callbacks._trainer._data_state import data_state_kept
from hawq_lightning.callbacks._trainer._own_iteration import copied_sampler, iterate_copy, iterates_itself
from hawq_lightning.sensitivity import seed_torch


def read_loader(
    loader: Iterable[Batch], images: int, seed: int, size_of: BatchSizeFn, most: int | None = None
) -> list[Batch]:
    """The first images of a loader, which is left as it was: neither it nor its data set, sampler or workers move on.

    Workers that the loader has stay out of it, since starting them takes seconds. Where reading fails without them
    (``worker_init_fn`` opens files, the data set asks for ``get_worker_info()``), workers of a copy of it read.

    Args:
        loader: any iterable.
        images: at least so many, or all.
        seed: of random transforms and samplers.
        size_of: number of samples in a batch.
        most: batches; ``None``: all.

    Raises:
        HawqError: a stream cannot be copied.
    """
    try:
        with data_state_kept(loader):
            return _until(itertools.islice(_in_this_process(loader, seed), most), images, size_of)
    except Exception as error:  # whatever somebody's data set raises
        if isinstance(error, HawqError) or not isinstance(loader, DataLoader) or not loader.num_workers:
            raise
        without = f"{type(error).__name__}: {error}"
    try:
        with data_state_kept(loader):
            return _until(itertools.islice(iterate_copy(loader, seed, workers=True), most), images, size_of)
    except Exception as error:
        error.add_note(f"HAWQ reads train data to measure; it asked workers, since without them there was {without}.")
        raise


def _in_this_process(loader: Iterable[Batch], seed: int) -> Iterator[Batch]:
    if not isinstance(loader, DataLoader):
        if isinstance(loader, Sized) and len(loader) == 0:
            return iter(())
        return iter(loader) if isinstance(loader, (list, tuple)) else iter(copied_stream(loader, "loader"))
    if iterates_itself(loader):
        return iterate_copy(loader, seed)
    if isinstance(loader.dataset, IterableDataset):
        return iter(
            DataLoader(
                copied_stream(loader.dataset, "data set"), batch_size=loader.batch_size, collate_fn=loader.collate_fn,
                drop_last=loader.drop_last,
            )
        )  # fmt: skip
    collate = loader.collate_fn or default_collate
    dataset = loader.dataset
    sampler: Iterable[Sequence[object]] | None = loader.batch_sampler
    if sampler is None:
        indices = iter(copied_sampler(loader.sampler, seed))
        return (collate(_item(dataset, i, seed)) for i in indices)
    lists: Iterator[Sequence[object]] = iter(copied_sampler(sampler, seed))
    return (collate(_items(dataset, ids, seed)) for ids in lists)


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
