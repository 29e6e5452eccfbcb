"""What a loss does, in a few digits: values, slopes and curvature on several batches, for the fingerprint.

The value alone does not tell a loss from one with a detached factor, nor a network from one with a reversed gradient.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from hawq_lightning._errors import HawqError
from hawq_lightning._types import Batch
from hawq_lightning.sensitivity._boundary import OutputHessian, Outputs, find_boundary
from hawq_lightning.sensitivity._context import MeasureContext
from hawq_lightning.sensitivity._isolate import random_states_kept
from hawq_lightning.sensitivity._memory import RanOut, attempt
from hawq_lightning.sensitivity._parameter_flags import ParametersNeeded

_OTHERS = 8


def loss_signature(context: MeasureContext, first: Batch, batches: Sequence[Batch], seed: int) -> str:
    """Words that another loss, another backward pass or other batches would change; other thread counts do not.

    Directions are random, of a generator of their own; numbers are relative to norms, in digits that rounding errors
    of float32 hardly reach. Buffers and random states are put back.

    Args:
        context: model, loss and sites; in evaluation.
        first: the first batch, or as much of it as memory holds.
        batches: all of them; the first two and at most eight others, evenly over all, are looked at.
        seed: of what the loss draws itself.
    """
    buffers = [(b, b.detach().clone()) for b in context.model.buffers() if b.layout == torch.strided]
    weights = [layer.weight for layer in context.layers.values()]
    weights = [w for w in dict.fromkeys(weights) if isinstance(w, torch.Tensor) and w.is_leaf]
    words = []
    try:
        last = len(batches) - 1
        for at in sorted({0, min(1, last)} | {round(i * last / _OTHERS) for i in range(1, _OTHERS + 1)}):
            with random_states_kept(seed), torch.enable_grad():
                for w in weights:
                    w.requires_grad_(True)
                words.append(_of_batch(context, batches[at] if at else first, weights))
    finally:
        for w in weights:
            w.requires_grad_(False)
        with torch.no_grad():
            for buffer, value in buffers:
                if not torch.equal(buffer, value):
                    buffer.copy_(value)
    return "; ".join(words)


def _of_batch(context: MeasureContext, batch: Batch, weights: Sequence[torch.Tensor]) -> str:
    def look() -> str:
        with Outputs(context.model) as outputs:
            loss = context.loss(batch)
            boundary, nested = find_boundary(loss, outputs)
            numbers = [f"{float(loss.detach()):.4g}"]
            if boundary and not nested:
                hessian = OutputHessian(loss, outputs, boundary)
                numbers += _projected(hessian.gradient)
                vectors = hessian.random_vectors(torch.Generator().manual_seed(1))
                try:
                    numbers += _projected(hessian(vectors))
                except HawqError:
                    numbers.append("no second derivative")
            slopes = torch.autograd.grad(loss, weights, allow_unused=True) if weights else ()
            numbers += _projected([g for g in slopes if g is not None])
            return " ".join(numbers)

    try:
        result = attempt(look)
    except ParametersNeeded:
        raise
    except (HawqError, RuntimeError) as error:  # whoever measures this batch will tell
        return type(error).__name__
    return "too large" if isinstance(result, RanOut) else result


def _projected(tensors: Sequence[torch.Tensor]) -> list[str]:
    """Mean logarithm of the norms, and a random projection of the directions."""
    generator = torch.Generator().manual_seed(2)
    logs, projection, count = 0.0, 0.0, 0
    for t in tensors:
        x = t.detach().double().cpu().flatten()
        norm = float(x.norm())
        direction = torch.randn(x.shape, generator=generator, dtype=torch.float32)
        sign = -1.0 if count % 2 else 1.0
        count += 1
        if norm > 0 and math.isfinite(norm):
            logs += math.log(norm)
            projection += sign * float(direction.double() @ x) / norm
    return [f"{round(logs / max(count, 1), 3) + 0.0:.3f}", f"{round(projection / max(count, 1) ** 0.5, 3) + 0.0:.3f}"]
