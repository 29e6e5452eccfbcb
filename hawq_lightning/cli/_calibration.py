"""Images that the grids of an integer file are made on, where the network was not trained with them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from lightning.pytorch.core.hooks import DataHooks

from hawq_lightning._batches import batch_images
from hawq_lightning._types import Batch
from hawq_lightning.sensitivity import random_states_kept

IMAGES = 256  # enough to see ranges on


class CalibrationBatches:
    """Training batches, as training sees them, augmented; none is loaded before somebody asks.

    Files are compared with the network on validation images, which must not choose their grids. Where there are no
    training images, validation images do, and that is printed.

    Args:
        hooks: who has the loaders.
        validation: batches in their place.
    """

    def __init__(self, hooks: DataHooks, validation: Iterable[Batch]) -> None:
        self._hooks, self._validation = hooks, validation
        self._drawn: list[Batch] | None = None

    def __iter__(self) -> Iterator[Batch]:
        if self._drawn is None:
            try:
                self._drawn = self._draw()
            except Exception as error:  # whatever the user's own loader raises
                print(f"The integer file's grids are made on validation images: there are none of training ({error}).")
                self._drawn = _first(self._validation)
        return iter(self._drawn)

    def _draw(self) -> list[Batch]:
        with random_states_kept(0):
            self._hooks.setup("fit")
            return _first(self._hooks.train_dataloader())


def _first(batches: Iterable[Batch]) -> list[Batch]:
    drawn, count = [], 0
    for batch in batches:
        drawn.append(batch)
        count += batch_images(batch)
        if count >= IMAGES:
            break
    return drawn
