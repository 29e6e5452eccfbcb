"""Elementwise work on large tensors, a piece at a time that stays in a core's cache from one operation to the next."""

from __future__ import annotations

from collections.abc import Iterator

import torch

_CACHED = 1 << 17  # elements


def pieces(*tensors: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """Flat views of the same elements of each, on a CPU; else, or where memory is laid out otherwise, they themselves.

    Args:
        tensors: of one shape; views of them are given, so that what is written to a piece is in them.
    """
    first = tensors[0]
    if first.device.type != "cpu" or first.numel() < 2 * _CACHED or not _alike(tensors):
        yield tensors
        return
    flat = [t.detach().as_strided((t.numel(),), (1,)) for t in tensors]
    yield from zip(*(t.split(_CACHED) for t in flat))


def product(slope: torch.Tensor, error: torch.Tensor) -> float:
    """Their inner product, in float32 at least."""
    wide = torch.promote_types(slope.dtype, torch.float32)
    return float(torch.dot(slope.flatten().to(wide), error.flatten().to(wide)))


def _alike(tensors: tuple[torch.Tensor, ...]) -> bool:
    """Whether all have their elements in the same order, without gaps."""
    first = tensors[0]
    dense = first.is_contiguous() or (first.ndim == 4 and first.is_contiguous(memory_format=torch.channels_last))
    return dense and all(t.stride() == first.stride() for t in tensors)
