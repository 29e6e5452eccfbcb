"""Images that the grids of an integer file are made on, where the network was not trained with them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain

from lightning.pytorch.core.hooks import DataHooks

from hawq_lightning._batches import batch_images
from hawq_lightning._types import Batch
from hawq_lightning.sensitivity import random_states_kept

IMAGES = 256  # enough to see ranges on


class CalibrationBatches:
    """Training batches, as training sees them, augmented; none is loaded before somebody asks, and each time the same.

    Files are compared with the network on validation images, which must not choose their grids. Where there are no
    training images, validation images do, and that is printed.

    Args:
        hooks: who has the loaders.
        validation: batches in their place.
    """

    def __init__(self, hooks: DataHooks, validation: Iterable[Batch]) -> None:
        self._hooks, self._validation = hooks, validation

    def __iter__(self) -> Iterator[Batch]:
        batches, count = self._start(), 0
        while count < IMAGES:
            with random_states_kept(count):
                batch = next(batches, None)
            if batch is None:
                return
            yield batch
            count += batch_images(batch)

    def _start(self) -> Iterator[Batch]:
        try:
            with random_states_kept(0):
                self._hooks.setup("fit")
                batches = iter(self._hooks.train_dataloader())
                return chain([next(batches)], batches)
        except Exception as error:  # whatever the user's own loader raises
            why = f"{type(error).__name__}: {error}".rstrip(": .")
            print(f"The integer file's grids are made on validation images: there are none of training ({why}).")
            return iter(self._validation)
