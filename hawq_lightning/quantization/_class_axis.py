"""Which axis of an output holds classes: that along which the loss takes a softmax, perhaps after moving axes."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.graph import Node

_SAME = 1e-6


def class_axis(loss: torch.Tensor, output: torch.Tensor, softmax: Node) -> int | None:
    """The axis of ``output`` that a softmax between it and the loss works along; ``None``: the softmax is of others.

    A slope that is put behind the softmax at one class alone comes back to that index of the axis, however axes
    were moved and joined on the way. It comes back to others where numbers were mixed: what goes into a product
    with others, as embeddings do in a contrastive loss, holds no classes.

    Args:
        loss: with its graph, which is kept.
        output: in it.
        softmax: a node of it that has the output behind it.
    """
    node: Any = softmax
    result = node._saved_result
    axis = node._saved_dim - 2**64 if node._saved_dim >= 2**63 else node._saved_dim  # negative ones are saved unsigned
    places = [i for i, n in enumerate(output.shape) if n == result.shape[axis]]
    if not places:
        return None
    try:
        nothing = _slope(loss, output, softmax, torch.zeros_like(result))
        for k in range(min(2, result.shape[axis])):
            back = _slope(loss, output, softmax, _at_class(result, axis, k)) - nothing
            whole = float(back.abs().sum())
            places = [
                i for i in places
                if whole > 0 and abs(float(back.select(i, k).abs().sum()) - whole) <= _SAME * whole
            ]  # fmt: skip
    except RuntimeError:  # the loss has been sent back already, and its graph is gone
        return places[0] if len(places) == 1 else None
    return places[0] if places else None


def _at_class(result: torch.Tensor, axis: int, k: int) -> torch.Tensor:
    probe = torch.zeros_like(result)
    there = probe.select(axis, k)
    there.copy_(torch.linspace(0.5, 1, there.numel(), dtype=torch.float32).reshape(there.shape))
    return probe


def _slope(loss: torch.Tensor, output: torch.Tensor, softmax: Node, behind: torch.Tensor) -> torch.Tensor:
    handle = softmax.register_hook(lambda grads, _: (behind, *grads[1:]))
    try:
        (slope,) = torch.autograd.grad(loss, output, retain_graph=True)
    finally:
        handle.remove()
    return slope.detach().double()
