"""Can the samples of a batch be told apart? Tried on the network and the loss, never assumed."""

from __future__ import annotations

import torch

from hawq_lightning._types import Batch, BatchSizeFn
from hawq_lightning.sensitivity._context import MeasureContext, forward_pass
from hawq_lightning.sensitivity._microbatch import slice_batch

_FEW = 16  # samples that tell as much as a batch


def samples_apart(context: MeasureContext, batch: Batch, samples: int, batch_size_fn: BatchSizeFn) -> dict[str, bool]:
    """Site -> whether rows are samples there; of a large batch by its first samples, if the loss takes them.

    Args:
        context: model, loss and sites.
        batch: samples.
        samples: their number.
        batch_size_fn: number of samples in a batch.
    """
    part = slice_batch(batch, samples, 0, _FEW, batch_size_fn) if samples > _FEW else None
    if part is not None:
        try:
            return independent_samples(context, part, _FEW)
        except Exception:  # somebody's loss: whatever it raises, the whole batch is what it was made for
            pass
    return independent_samples(context, batch, samples)


def independent_samples(context: MeasureContext, batch: Batch, samples: int) -> dict[str, bool]:
    """Site -> whether sample 0's outputs alone reach row 0 alone of what its layers read and return.

    Also the loss: whether its Hessian leaks from sample 0 to others.

    Args:
        context: model, loss and sites.
        batch: samples.
        samples: their number.
    """
    if samples < 2:
        return {s.name: False for s in context.table}
    nothing, warn_once = {s.name: False for s in context.table}, context.diagnostics.warn_once
    with forward_pass(context, batch, nothing) as forward:
        values = forward.hessian.values
        if any(v.ndim == 0 or v.shape[0] != samples for v in values):
            context.diagnostics.warn_once(
                "Rows of the loss's inputs are not images: whole batches are the unit of the traces."
            )
            return nothing
        generator = torch.Generator().manual_seed(0)
        first = [torch.randn(v.shape, generator=generator).to(v) for v in values]
        for v in first:
            v[1:] = 0
        if any(bool(h[1:].any()) for h in forward.hessian(first)):
            context.diagnostics.warn_once(
                "The loss couples the images of a batch: whole batches are the unit of the traces."
            )
            return nothing
        forward.free_loss()
        network = forward.network
        network.recording, network.samples, network.leaks = False, samples, {}
        forward.hessian.backward(first, last=True)
        leaks = network.leaks
    shared = [n for n, leak in leaks.items() if leak]
    if shared:
        warn_once(f"Rows are not images at {', '.join(shared[:3])}{'...' if len(shared) > 3 else ''}: batch sums.")
    return {s.name: not leaks.get(s.name, True) for s in context.table}
