"""Samples of several batches, packed into batches that go through the network together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from hawq_lightning._batches import batch_images, like, parts_of
from hawq_lightning._types import Batch, BatchSizeFn
from hawq_lightning.sensitivity._microbatch import pick


def join(parts: Sequence[Batch], counts: Sequence[int]) -> Batch | None:
    """One batch of several of the same make, sample after sample; ``None`` where they do not fit together."""
    if len(parts) == 1:
        return parts[0]
    try:
        whole = _join(parts, counts)
        return whole if batch_images(whole) == sum(counts) else None
    except Exception:  # whatever is odd about them, they go one by one
        return None


def _join(parts: Sequence[Batch], counts: Sequence[int]) -> Batch:
    first = parts[0]
    if isinstance(first, torch.Tensor):
        if all(p.ndim and p.shape[0] == n and p.shape[1:] == first.shape[1:] for p, n in zip(parts, counts)):
            return torch.cat(list(parts))
        raise ValueError("tensors of other shapes")
    inner = [parts_of(p) for p in parts]
    if inner[0]:
        plain = isinstance(first, (list, tuple)) and not hasattr(first, "_fields")
        if plain and all(len(p) == n for p, n in zip(parts, counts)) and not _rows(inner, counts):
            return type(first)([x for p in parts for x in p])
        if len({len(p) for p in inner}) != 1:
            raise ValueError("other numbers of parts")
        return like(first, [_join(values, counts) for values in zip(*inner)])
    if all(p == first for p in parts):
        return first
    raise ValueError("other constants")


def _rows(inner: Sequence[Sequence[object]], counts: Sequence[int]) -> bool:
    """Whether a list holds tensors with a row a sample, rather than an entry a sample."""
    return all(isinstance(x, torch.Tensor) and x.ndim > 0 and x.shape[0] == n for p, n in zip(inner, counts) for x in p)


@dataclass(frozen=True)
class Chunk:
    """Samples of one or several batches that go through the network together.

    Attributes:
        batch: what the loss gets.
        segments: (number of the batch, positions of the samples in it), in order.
    """

    batch: Batch
    segments: tuple[tuple[int, torch.Tensor], ...]

    @property
    def samples(self) -> int:
        """How many."""
        return sum(len(ids) for _, ids in self.segments)


def chunks(
    batches: Sequence[Batch],
    samples: Sequence[int],
    chosen: Sequence[tuple[int, torch.Tensor]],
    largest: int,
    batch_size_fn: BatchSizeFn,
) -> list[Chunk]:
    """Pack chosen samples into batches of at most ``largest``, joining batches that fit together.

    Args:
        batches: all of them.
        samples: number of samples of each.
        chosen: (batch, positions) in order.
        largest: samples at a time.
        batch_size_fn: number of samples in a batch.

    Raises:
        LookupError: it is not clear how to take samples out of a batch.
    """
    out: list[Chunk] = []
    waiting: list[tuple[int, torch.Tensor, Batch]] = []

    def flush() -> None:
        if not waiting:
            return
        whole = join([w[2] for w in waiting], [len(w[1]) for w in waiting])
        if whole is not None:
            out.append(Chunk(whole, tuple((n, ids) for n, ids, _ in waiting)))
        else:
            out.extend(Chunk(part, ((n, ids),)) for n, ids, part in waiting)
        waiting.clear()

    for number, ids in chosen:
        for piece in ids.split(largest):
            if not len(piece):
                continue
            part = pick(batches[number], samples[number], piece, batch_size_fn)
            if part is None:
                raise LookupError(number)
            if sum(len(w[1]) for w in waiting) + len(piece) > largest:
                flush()
            waiting.append((number, piece, part))
    flush()
    return out
