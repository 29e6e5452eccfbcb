"""Batches that stay where they are, and go to the model's device one at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import overload

import torch

from hawq_lightning._batches import like, parts_of
from hawq_lightning._types import Batch, BatchSizeFn


class OnDevice(Sequence[Batch]):
    """A sequence whose items are moved when they are asked for; the last one is kept until another is.

    Args:
        kept: the batches, in the memory of the computer.
        move: gives a batch on the device.
        size_of: number of samples in a batch; ``None``: as whoever reads them counts.

    Attributes:
        drawn: how many there were before some were left out.
    """

    def __init__(
        self, kept: Sequence[Batch], move: Callable[[Batch], Batch], size_of: BatchSizeFn | None = None
    ) -> None:
        self.kept, self.move, self.size_of = kept, move, size_of
        self.drawn = len(kept)
        self._last: tuple[int, Batch] | None = None

    def __len__(self) -> int:
        return len(self.kept)

    @overload
    def __getitem__(self, index: int) -> Batch: ...
    @overload
    def __getitem__(self, index: slice) -> OnDevice: ...
    def __getitem__(self, index: int | slice) -> Batch | OnDevice:
        """The batch on the device, or a part of the sequence, none of which is moved."""
        if isinstance(index, slice):
            return OnDevice(self.kept[index], self.move, self.size_of)
        number = range(len(self.kept))[index]
        if self._last is None or self._last[0] != number:
            self._last = None  # before the next one takes memory
            self._last = (number, self.move(self.kept[number]))
        return self._last[1]

    def only(self, numbers: Sequence[int]) -> OnDevice:
        """Those of the batches that have these numbers, none of which is moved; as many count as drawn as before."""
        chosen = OnDevice([self.kept[n] for n in numbers], self.move, self.size_of)
        chosen.drawn = self.drawn
        return chosen

    def samples(self, size_of: BatchSizeFn) -> list[int]:
        """Number of samples of each batch, by ``size_of`` where the batches have no way of their own."""
        return list(map(self.size_of or size_of, self.kept))


def on_device(batches: Iterable[Batch], device: torch.device) -> OnDevice:
    """The batches of an iterable, to be moved one at a time; those that move already stay as they are."""
    if isinstance(batches, OnDevice):
        return batches
    return OnDevice(list(batches), partial(to_device, device=device))


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Move a batch: tensors, what has a method ``to`` (graphs, packed sequences), and what containers hold of both.

    Containers stay of their types. Inference tensors become plain ones.
    """
    if isinstance(batch, torch.Tensor):
        return batch.clone() if batch.is_inference() and batch.device == device else batch.to(device)
    if callable(getattr(batch, "to", None)) and not isinstance(batch, type):
        return batch.to(device)
    if parts := parts_of(batch):
        return like(batch, [to_device(v, device) for v in parts])
    return batch
