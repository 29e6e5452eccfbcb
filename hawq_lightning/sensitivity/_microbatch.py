"""Batches in parts: for where memory runs out, and for checks that need only a few samples."""

from __future__ import annotations

import torch

from hawq_lightning._batches import batch_images, like, parts_of
from hawq_lightning._errors import HawqError
from hawq_lightning._types import Batch, BatchSizeFn
from hawq_lightning.sensitivity._context import MeasureContext, forward_pass

_ENOUGH = 16  # samples at a time to tell a mean from a sum by
_WINDOWS = 8  # places along a batch at which that is tried


def slice_batch(
    batch: Batch, samples: int, start: int, stop: int, batch_size_fn: BatchSizeFn = batch_images
) -> Batch | None:
    """Samples ``start`` to ``stop`` of a batch; see :func:`pick`."""
    return pick(batch, samples, torch.arange(start, stop), batch_size_fn)


def pick(batch: Batch, samples: int, ids: torch.Tensor, batch_size_fn: BatchSizeFn = batch_images) -> Batch | None:
    """The samples at positions ``ids`` of a batch of tensors, or of lists with one entry a sample.

    Returns:
        a batch of the same make; ``None`` where it is not clear how to take samples out.
    """
    try:
        part = _pick(batch, samples, ids, top=True)
        return part if batch_size_fn(part) == len(ids) else None
    except (_UnclearError, HawqError):
        return None


class _UnclearError(Exception):
    """No telling which entries belong to which sample."""


def _pick(x: Batch, samples: int, ids: torch.Tensor, top: bool = False) -> Batch:
    """One entry of a batch; ``top``: the batch itself, which must hold something that goes by samples."""
    if isinstance(x, torch.Tensor):
        if x.ndim and x.shape[0] == samples:
            return x[ids.to(x.device)] if x.layout == torch.strided else _rows_of_sparse(x, ids)
        raise _UnclearError
    if parts := parts_of(x):
        try:
            return like(x, [_pick(v, samples, ids) for v in parts])
        except _UnclearError:
            if isinstance(x, (list, tuple)) and len(x) == samples and not hasattr(x, "_fields"):
                return type(x)([x[i] for i in ids.tolist()])
            raise
    if top:
        raise _UnclearError
    return x  # numbers, strings and None concern all samples


def _rows_of_sparse(x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    try:
        rows: torch.Tensor = x.to_sparse_coo().index_select(0, ids.to(x.device))
        return rows if x.layout == torch.sparse_coo else rows.to_sparse(layout=x.layout)
    except (RuntimeError, NotImplementedError) as error:  # blocks, or batches of matrices, that torch cannot divide
        raise _UnclearError from error


def loss_reduction(context: MeasureContext, batch: Batch, samples: int, size: int, batch_size_fn: BatchSizeFn) -> str:
    """How the loss of a part relates to the loss of the batch: ``mean`` or ``sum`` over samples.

    The output Hessian of a sample is compared in a part of ``size`` samples and in half of that part, all along the
    batch, so that the whole batch is never needed.

    Args:
        context: model, loss and sites.
        batch: a whole batch.
        samples: their number.
        size: samples in a part.
        batch_size_fn: number of samples in a batch.

    Raises:
        HawqError: neither, so that parts do not add up to the batch.
    """
    size = min(size, _ENOUGH) // 2 * 2
    if size < 2:
        raise HawqError("Memory ran out with two images at a time; make them smaller.")
    nothing = {s.name: False for s in context.table}

    def curvature(start: int, stop: int) -> list[torch.Tensor]:
        part = slice_batch(batch, samples, start, stop, batch_size_fn)
        if part is None:
            raise HawqError(
                "Memory ran out, and it is not clear how to take images out of this batch; use smaller ones."
            )
        with forward_pass(context, part, nothing) as forward:
            values = forward.hessian.values
            probe = [
                torch.cos(torch.arange(v[0].numel(), dtype=torch.float32, device=v.device)).reshape(v[0].shape).to(v)
                for v in values
            ]
            turned = forward.hessian([p.expand_as(v) for p, v in zip(probe, values)])
            return [t.detach() for t in (*forward.hessian([torch.ones_like(v) for v in values]), *turned)]

    half = size // 2
    starts = list(range(0, samples - size + 1, half))
    ratios = []
    for first in starts[:: -(-len(starts) // _WINDOWS)]:
        whole = curvature(first, first + size)
        for shift in (0, half):
            alone = curvature(first + shift, first + shift + half)
            top = max(float(b.abs().max()) for b in alone)
            for a, b in zip(whole, alone):
                significant = b.abs() > 1e-3 * top
                ratios += (a[shift : shift + half][significant] / b[significant]).tolist()
    for kind, expected in (("mean", 0.5), ("sum", 1.0)):
        if ratios and all(abs(r - expected) < 0.01 * expected for r in ratios):
            return kind
    raise HawqError(
        "Memory ran out, and the loss couples the images of a batch (a weighted mean, a normaliser, or a contrast), so "
        "the batch cannot be measured in parts; use a smaller batch size."
    )
