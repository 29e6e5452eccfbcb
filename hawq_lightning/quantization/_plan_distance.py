"""What a plan does to the outputs, measured on batches: right after quantizing, or with BatchNorm settled."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from hawq_lightning._batches import batch_images
from hawq_lightning._plan import Plan
from hawq_lightning._types import Batch, BatchSizeFn
from hawq_lightning.quantization._float_distance import FloatDistance, PlanLoss
from hawq_lightning.quantization._norm_statistics import norms_of
from hawq_lightning.quantization._registry import QuantizerSpec
from hawq_lightning.quantization._trial import plans_in_place
from hawq_lightning.sensitivity import on_device


@contextmanager
def distance_of_plan(
    model: nn.Module,
    batches: Sequence[Batch],
    target: FloatDistance,
    *,
    settle: Callable[[nn.Module], object] | None = None,
    batch_size_fn: BatchSizeFn = batch_images,
    quantizer: str | QuantizerSpec | None = None,
    attention: bool = False,
    results: Iterable[str] = (),
) -> Iterator[Callable[[Plan], PlanLoss]]:
    """Inside, a function from a plan to what it changes in the outputs, by one pass over the batches.

    Args:
        model: float, or with quantizers in any state; left as it was.
        batches: held-out ones, which ``target`` knows.
        target: made of the float model.
        settle: called with every quantized model before it is measured, to renew its buffers, such as BatchNorm's
            statistics by :func:`hawq_lightning.quantization.post_training.reestimate_batchnorm`.
        batch_size_fn: number of samples in a batch.
        quantizer: registered name; ``None``: the layers' own; for a float model that of the first plan.
        attention: plans have sites of attention.
        results: those of the plans' sites, among layers' names.
    """
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    moved = on_device(batches, device)
    samples = moved.samples(batch_size_fn)
    with plans_in_place(model, quantizer, attention, results, anew=settle is not None) as put:

        def measured(plan: Plan) -> PlanLoss:
            put(plan)
            with _statistics_kept(model):
                if settle is not None:
                    settle(model)
                losses = [target.compare(model, batch) for batch in moved]
            return _mean(losses, samples)

        yield measured


def _mean(losses: Sequence[PlanLoss], samples: Sequence[int]) -> PlanLoss:
    total = sum(samples)
    changed = [x.changed for x in losses if x.changed is not None]
    return PlanLoss(
        sum(x.kl * n for x, n in zip(losses, samples)) / total,
        sum(c * n for c, n in zip(changed, samples)) / total if len(changed) == len(losses) else None,
    )


@contextmanager
def _statistics_kept(model: nn.Module) -> Iterator[None]:
    """Afterwards every BatchNorm has the running statistics that it had."""
    before = [(b, b.detach().clone()) for m in norms_of(model).values() for b in m.buffers(recurse=False)]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in before:
                buffer.copy_(value)
