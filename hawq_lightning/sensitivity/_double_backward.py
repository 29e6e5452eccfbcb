"""Gradients that can be differentiated again: of the loss, or of the loss made linear in the network's outputs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from hawq_lightning._types import Batch
from hawq_lightning.layers import as_reader
from hawq_lightning.sensitivity._context import ForwardPass, MeasureContext, forward_pass
from hawq_lightning.sensitivity._recomputed_weights import EffectiveWeights
from hawq_lightning.sensitivity._second_derivative import (
    NoSecondDerivative,
    told_in_one_sentence,
    twice_differentiable,
)

Sampler = Callable[[torch.Tensor], torch.Tensor]
Points = Mapping[str, list[torch.Tensor]]


def rademacher(generator: torch.Generator) -> Sampler:
    """Random signs."""
    return lambda like: torch.randint(0, 2, like.shape, generator=generator).mul_(2).sub_(1).to(like)


def gaussian(generator: torch.Generator) -> Sampler:
    """Standard normal numbers: the paper's other choice, with more variance."""
    return lambda like: torch.randn(like.shape, generator=generator, dtype=torch.float64).to(like)


@dataclass
class GradGraph:
    """First derivatives with their graph.

    Attributes:
        forward: the forward pass behind them.
        points: site -> its weight, or the tensors that its layers read.
        gradient: site -> one tensor for each point; ``None`` where the point does not reach the loss.
    """

    forward: ForwardPass
    points: dict[str, list[torch.Tensor]]
    gradient: dict[str, list[torch.Tensor | None]]

    def product(self, site: str, vectors: list[torch.Tensor]) -> list[torch.Tensor]:
        """The Hessian block of one site times ``vectors``, one tensor a point."""
        points, gradients = self.points[site], self.gradient[site]
        pairs = [(g, v) for g, v in zip(gradients, vectors) if g is not None and g.requires_grad]
        if not pairs:
            return [torch.zeros_like(p) for p in points]
        with told_in_one_sentence():
            products = torch.autograd.grad(
                [g for g, _ in pairs], points, [v for _, v in pairs], retain_graph=True, allow_unused=True
            )
        return [torch.zeros_like(p) if h is None else h.detach() for h, p in zip(products, points)]


@contextmanager
def gradients_of(
    context: MeasureContext,
    batch: Batch,
    per_sample: Mapping[str, bool],
    direction: Callable[[ForwardPass], list[torch.Tensor]] | None = None,
    *,
    sites: Iterable[str] | None = None,
    weights: bool = True,
) -> Iterator[GradGraph]:
    """Run one batch forwards and once backwards, keeping the graph of the gradients.

    Args:
        context: model, loss and sites.
        batch: one batch.
        per_sample: site -> whether its rows are images.
        direction: what to send back from the boundary, detached: the gradients are then those of the linearised
            loss ``<direction, f(theta)>``. ``None``: of the loss itself.
        sites: which; all by default.
        weights: also differentiate by weights, the effective ones where a hook computes them.

    Raises:
        Overwritten: see :func:`with_copies`.
    """
    owners = {x.weight: as_reader(context.layers[x.name]) for x in reversed(context.table.layers)} if weights else {}
    requested = {s.name for s in context.table} if sites is None else set(sites)
    owners = {n: x for n, x in owners.items() if n in requested}
    leaves = [x.weight for x in owners.values() if not x.recomputed]
    effective = EffectiveWeights(owners)
    try:
        for w in leaves:
            w.requires_grad_(True)
        with twice_differentiable(), effective, forward_pass(context, batch, per_sample) as forward:
            if direction is None and (operation := context.diagnostics.once_only):
                raise NoSecondDerivative(operation)  # not every operation says so by itself
            forward.network.recording = False
            forward.network.check_reads()
            points: dict[str, list[Any]] = {n: [effective[n]] for n in owners}
            points |= {n: p for n, p in forward.network.aliases().items() if n in requested}
            flat = [t for tensors in points.values() for t in tensors]
            gradients_flat: Sequence[torch.Tensor] = ()
            if not flat:
                pass  # torch refuses to differentiate by nothing
            elif direction is None:
                assert forward.loss is not None
                gradients_flat = torch.autograd.grad(forward.loss, flat, create_graph=True, allow_unused=True)
            else:
                vectors = forward.hessian.in_output_dtypes(direction(forward))
                gradients_flat = torch.autograd.grad(
                    forward.hessian.edges, flat, vectors, create_graph=True, allow_unused=True
                )
            gradients = iter(gradients_flat)
            yield GradGraph(
                forward, points, {site: [next(gradients) for _ in tensors] for site, tensors in points.items()}
            )
    finally:
        for w in leaves:
            w.requires_grad_(False)


def loss_gradient(forward: ForwardPass) -> list[torch.Tensor]:
    """The loss's gradient at the boundary, as a constant: its linearised loss misses what Gauss-Newton has."""
    return [g.detach() for g in forward.hessian.gradient]
