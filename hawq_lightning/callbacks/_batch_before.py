"""A batch as it was before a step that may change it, for another network to run on."""

from __future__ import annotations

import torch

from hawq_lightning._batches import fresh_copy
from hawq_lightning._loss_graph import tensors_of
from hawq_lightning._types import Batch


class BatchBefore:
    """Keeps what steps get, and learns from the first one whether tensors must be copied.

    Containers are always copied. Tensors are cloned for the first step, and for later ones if that step wrote into its
    batch, or if torch cannot tell of one of its tensors.
    """

    def __init__(self) -> None:
        self._clones = True
        self._first = True
        self._given: list[tuple[torch.Tensor, int | None]] = []
        self._copies: list[torch.Tensor] = []

    def hold(self, batch: Batch) -> Batch:
        """A copy that stays as it is while a step runs on ``batch``."""
        self._given = [(t, _version(t)) for t in tensors_of(batch)]
        held = fresh_copy(batch, tensors=self._clones)
        self._copies = tensors_of(held) if self._first else []
        return held

    def is_held(self) -> bool:
        """Whether the copy is what the step got; to be asked when the step is over.

        ``False`` once at most: for a step that is the first to write into its batch, though steps before it did not.
        """
        given, copies, first = self._given, self._copies, self._first
        self._given, self._copies, self._first = [], [], False  # a batch's memory, until the next one
        written = any(v is None or t._version != v for t, v in given)
        if first:
            # writing through .data or NumPy moves no version
            self._clones = written or not all(torch.equal(t, c) for (t, _), c in zip(given, copies, strict=True))
            return True
        kept, self._clones = self._clones or not written, self._clones or written
        return kept


def _version(tensor: torch.Tensor) -> int | None:
    return None if tensor.is_inference() or tensor.is_nested or tensor.layout != torch.strided else tensor._version
