"""How many batches an epoch will have, known to steps that are lent out before the Trainer has set up its data."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence, Sized
from contextlib import contextmanager
from typing import Any

from lightning.pytorch import Trainer
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, DistributedSampler

from hawq_lightning._errors import HawqError
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


def batches_to_overfit(trainer: Trainer, loaders: Sequence[object], mode: str) -> list[int | None]:
    """How many batches of each loader ``Trainer(overfit_batches=...)`` trains on; ``None``: all.

    Where processes share the data, each has so many of its own: all of theirs count, as they lie in the data set.

    Args:
        trainer: with ``overfit_batches``, a number of batches (int) or a share of them (float).
        loaders: of the train data, in the order that they will have.
        mode: how they make one epoch.

    Raises:
        HawqError: the share is less than a batch.
    """
    overfit: int | float = trainer.overfit_batches  # type: ignore[attr-defined]
    for length in (_length(trainer, loader) for loader in loaders):
        if length and not _limited(length, overfit):
            raise HawqError(
                f"Trainer(overfit_batches={overfit}) is less than one of {length} batches; the least share is "
                f"{1 / length:.3g}, and an int is a number of batches."
            )
    count = _together(trainer, loaders, mode)
    if math.isinf(count):
        return [None] * len(loaders)
    shared = [isinstance(x, DataLoader) and _is_divided(trainer, x) for x in loaders]
    return [int(count) * (trainer.world_size if divided else 1) for divided in shared]


def _batches_of(trainer: Trainer, loaders: Any) -> int | float:
    mode = "max_size_cycle"
    if isinstance(loaders, kinds("utilities.CombinedLoader")):
        mode, loaders = loaders._mode, loaders.iterables
    return _together(trainer, tree_leaves(loaders) if isinstance(loaders, (dict, list, tuple)) else [loaders], mode)


def _together(trainer: Trainer, loaders: Sequence[object], mode: str) -> int | float:
    lengths = [_limited(_length(trainer, loader), trainer.limit_train_batches) for loader in loaders]
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
