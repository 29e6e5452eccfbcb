"""The paper's estimator: Hutchinson's method on the true Hessian, one site at a time (eq. 6-9).

Tr(H_l) = E[z^T H_l z] for random z with E[z z^T] = I, H_l z by double backward through the network. Of the loss itself
it is the check of all other estimators, and slow. Of the loss made linear in the network's outputs it gives only what
Gauss-Newton probes leave out, so that the sum of both is the true trace with little noise.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch

from hawq_lightning._config import MeasureConfig
from hawq_lightning._types import Batch
from hawq_lightning.sensitivity._context import MeasureContext
from hawq_lightning.sensitivity._double_backward import (
    GradGraph,
    Sampler,
    gaussian,
    gradients_of,
    loss_gradient,
    rademacher,
)
from hawq_lightning.sensitivity._estimator import Estimator, Pilot, ProbeRequest, Probes, register_estimator
from hawq_lightning.sensitivity._grad_capture import with_copies

_DISTRIBUTIONS = {"rademacher": rademacher, "gaussian": gaussian}


@register_estimator("hutchinson")
class Hutchinson(Estimator):
    """Rows are ``z^T H_l z``: weight rows are batches; activation rows are samples where these can be told apart.

    Args:
        distribution: of z: ``rademacher`` or ``gaussian``.
    """

    second_derivatives = whole_loss = True

    def __init__(self, distribution: str = "rademacher") -> None:
        self._vectors = _DISTRIBUTIONS[distribution]

    def prepare(self, context: MeasureContext, pilot: Pilot, config: MeasureConfig) -> Estimator:
        """One with the vectors of the config."""
        return Hutchinson(config.distribution)

    def probe(self, context: MeasureContext, request: ProbeRequest) -> Probes:
        """See :meth:`Estimator.probe`."""
        return hutchinson_batch(
            context, request.batch, request.samples, self.row_unit(context, request.per_sample),
            self._vectors(request.generator()), request.probes,
        )  # fmt: skip


def hutchinson_batch(
    context: MeasureContext,
    batch: Batch,
    samples: int,
    per_sample: Mapping[str, bool],
    sampler: Sampler,
    probes: int,
    *,
    linearised: bool = False,
    only: Collection[str] | None = None,
) -> Probes:
    """Estimates of every site's trace for one batch.

    Args:
        context: model, loss and sites.
        batch: samples.
        samples: their number.
        per_sample: site -> whether its rows are samples: never for weights; for activations where samples are
            independent, since then eq. 9 holds.
        sampler: draws a random tensor like another.
        probes: how many estimates.
        linearised: of the linearised loss: the part of the Hessian that Gauss-Newton leaves out.
        only: sites to work on; all by default.
    """
    direction = loss_gradient if linearised else None

    def run() -> Probes:
        with gradients_of(context, batch, per_sample, direction, sites=only) as gradients:
            rows = [
                {s: _quadratic_form(gradients, s, sampler, per_sample[s], samples) for s in gradients.points}
                for _ in range(probes)
            ]
            network = gradients.forward.network
            return Probes(rows, {s: network.sizes(s, samples) for s in gradients.points if s in network.aliases()})

    return with_copies(context.diagnostics.overwritten, run)


def _quadratic_form(gradients: GradGraph, site: str, sampler: Sampler, per_sample: bool, samples: int) -> torch.Tensor:
    """``z^T H z`` of one site (rows,)."""
    total = torch.zeros(samples if per_sample else 1, dtype=torch.float64)
    z = [sampler(p) for p in gradients.points[site]]
    for v, h in zip(z, gradients.product(site, z)):
        part = (v * h).to(torch.float64)
        total += (part.flatten(1).sum(1) if per_sample else part.sum()[None]).cpu()
    return total
