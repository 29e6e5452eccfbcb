"""How many batches an epoch will have, known to steps that are lent out before the Trainer has set up its data."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sized
from contextlib import contextmanager
from typing import Any

from lightning.pytorch import Trainer
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, DistributedSampler

from hawq_lightning.callbacks._trainer._namespaces import kinds


@contextmanager
def epoch_length_kept(trainer: Trainer) -> Iterator[None]:
    """Put back what :func:`foretell_epoch_length` set, unless the Trainer has set up its data meanwhile."""
    loop = trainer.fit_loop
    before, ready = loop.max_batches, loop._combined_loader is not None
    try:
        yield
    finally:
        if not ready and loop._combined_loader is None:
            loop.max_batches = before


def foretell_epoch_length(trainer: Trainer, loaders: object) -> None:
    """Let ``trainer.num_training_batches`` be what it will be in training; schedules in ``training_step`` divide by it.

    Args:
        trainer: in whose loop the number stands, if its data are not set up yet.
        loaders: of the train data: one, several in containers, or a CombinedLoader.
    """
    if trainer.fit_loop._combined_loader is None and trainer.state.fn == "fit":
        trainer.fit_loop.max_batches = _batches_of(trainer, loaders)


def _batches_of(trainer: Trainer, loaders: Any) -> int | float:
    mode = "max_size_cycle"
    if isinstance(loaders, kinds("utilities.CombinedLoader")):
        mode, loaders = loaders._mode, loaders.iterables
    leaves = tree_leaves(loaders) if isinstance(loaders, (dict, list, tuple)) else [loaders]
    lengths = [_limited(_length(trainer, loader), trainer.limit_train_batches) for loader in leaves]
    if not lengths:
        return 0
    return min(lengths) if mode == "min_size" else max(lengths)  # fit takes no sequential one


def _length(trainer: Trainer, loader: object) -> int | float:
    try:
        if isinstance(loader, DataLoader) and (size := loader.batch_size) and _is_divided(trainer, loader):
            items = math.ceil(len(loader.sampler) / trainer.world_size)  # type: ignore[arg-type]
            return items // size if loader.drop_last else math.ceil(items / size)
        return len(loader) if isinstance(loader, Sized) else math.inf
    except (TypeError, NotImplementedError):  # a stream
        return math.inf


def _is_divided(trainer: Trainer, loader: DataLoader[object]) -> bool:
    """Whether Lightning will give every process its own part of the data."""
    divides = trainer.world_size > 1 and trainer._accelerator_connector.use_distributed_sampler
    return divides and not isinstance(loader.sampler, DistributedSampler)


def _limited(length: int | float, limit: int | float) -> int | float:
    """Lightning's reading of ``limit_train_batches``: a number of batches, or a share of them."""
    if isinstance(limit, int):
        return min(length, limit)
    return length if limit == 1.0 or math.isinf(length) else int(length * limit)
