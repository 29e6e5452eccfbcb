"""Batches in parts: for where memory runs out, and for checks that need only a few images."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from hawq_lightning._batches import batch_images, like, parts_of
from hawq_lightning._errors import HawqError
from hawq_lightning.sensitivity._context import MeasureContext, forward_pass

ImagesOf = Callable[[Any], int]
_ENOUGH = 16  # images at a time to tell a mean from a sum by
_WINDOWS = 8
RAN_OUT = "Memory ran out"  # how the sentence about it begins


def take(batch: Any, images: int, start: int, stop: int, batch_size_fn: ImagesOf = batch_images) -> Any | None:
    """Images ``start`` to ``stop`` of a batch; see :func:`pick`."""
    return pick(batch, images, torch.arange(start, stop), batch_size_fn)


def pick(batch: Any, images: int, ids: torch.Tensor, batch_size_fn: ImagesOf = batch_images) -> Any | None:
    """The images at positions ``ids`` of a batch of tensors, or of lists with one entry an image.

    Returns:
        a batch of the same make; ``None`` where it is not clear how to take images out.
    """
    try:
        part = _pick(batch, images, ids, top=True)
        return part if batch_size_fn(part) == len(ids) else None
    except (_UnclearError, HawqError):
        return None


class _UnclearError(Exception):
    """No telling which entries belong to which image."""


def _pick(x: Any, images: int, ids: torch.Tensor, top: bool = False) -> Any:
    if isinstance(x, torch.Tensor):
        if x.ndim and x.shape[0] == images:
            return x[ids.to(x.device)]
        raise _UnclearError
    if parts := parts_of(x):
        try:
            return like(x, [_pick(v, images, ids) for v in parts])
        except _UnclearError:
            if isinstance(x, (list, tuple)) and len(x) == images and not hasattr(x, "_fields"):
                return type(x)([x[i] for i in ids.tolist()])
            raise
    if top:
        raise _UnclearError
    return x  # numbers, strings and None concern all images


def out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out, on whatever device."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and ("out of memory" in text or "can't allocate memory" in text)


def loss_reduction(setting: MeasureContext, batch: Any, images: int, size: int, batch_size_fn: ImagesOf) -> str:
    """How the loss of a part relates to the loss of the batch: ``mean`` or ``sum`` over images.

    The output Hessian of an image is compared in a part of ``size`` images and in half of that part, all along the
    batch, so that the whole batch is never needed.

    Raises:
        HawqError: neither, so that parts do not add up to the batch.
    """
    size = min(size, _ENOUGH) // 2 * 2
    if size < 2:
        raise HawqError("Memory ran out with two images at a time; make them smaller.")
    nothing = {s.name: False for s in setting.table}

    def curvature(start: int, stop: int) -> list[torch.Tensor]:
        part = take(batch, images, start, stop, batch_size_fn)
        if part is None:
            raise HawqError(
                "Memory ran out, and it is not clear how to take images out of this batch; use smaller ones."
            )
        with forward_pass(setting, part, nothing) as step:
            values = step.hessian.values
            probe = [torch.cos(torch.arange(v[0].numel(), device=v.device)).reshape(v[0].shape).to(v) for v in values]
            turned = step.hessian([p.expand_as(v) for p, v in zip(probe, values)])
            return [t.detach() for t in (*step.hessian([torch.ones_like(v) for v in values]), *turned)]

    half = size // 2
    starts = list(range(0, images - size + 1, half))
    ratios = []
    for first in starts[:: -(-len(starts) // _WINDOWS)]:
        whole = curvature(first, first + size)
        for shift in (0, half):
            alone = curvature(first + shift, first + shift + half)
            top = max(float(b.abs().max()) for b in alone)
            for a, b in zip(whole, alone):
                solid = b.abs() > 1e-3 * top
                ratios += (a[shift : shift + half][solid] / b[solid]).tolist()
    for kind, wanted in (("mean", 0.5), ("sum", 1.0)):
        if ratios and all(abs(r - wanted) < 0.01 * wanted for r in ratios):
            return kind
    raise HawqError(
        "Memory ran out, and the loss couples the images of a batch (a weighted mean, a normaliser, or a contrast), so "
        "the batch cannot be measured in parts; use a smaller batch size."
    )
