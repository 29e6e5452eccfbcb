"""Is all curvature of the loss behind the outputs that probes are sent from? One product with its true Hessian tells.

Gauss-Newton traces count the curvature between the network's outputs and the loss. What was taken for an output may
not be one, as where a loss module owns parameters and goes unrecognised. In the weights that the loss reads last, with
no other site in between, a network is linear; if the true Hessian there is another one, curvature was missed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.autograd.graph import Node

from hawq_lightning._errors import HawqError
from hawq_lightning._loss_graph import walk
from hawq_lightning.sensitivity._context import ForwardPass, MeasureContext
from hawq_lightning.sensitivity._double_backward import gradients_of, loss_gradient, rademacher
from hawq_lightning.sensitivity._estimator import Pilot
from hawq_lightning.sensitivity._grad_capture import with_copies
from hawq_lightning.sensitivity._isolate import random_states_kept
from hawq_lightning.sensitivity._memory import RanOut, attempt

_FEW = 4  # samples at the most
_ROWS = 64  # that a measurement takes at the least, if it may: samples times probes
_TENTH = 16  # rows that take ten times as long as one sample of the check, as measured
_MOST = 4  # sites
_DISAGREES = 0.5  # share of the larger


def check_samples(samples: int, probes: int) -> int:
    """Samples whose check takes at most a tenth of the measurement's time; one at the least.

    Args:
        samples: that are measured.
        probes: random vectors a batch at the most.
    """
    rows = samples * min(probes, max(2, -(-_ROWS // samples)))
    return max(1, min(_FEW, samples, rows // _TENTH))


def check_boundary(context: MeasureContext, pilot: Pilot, seed: int, samples: int = _FEW) -> None:
    """Say where the traces miss curvature of the loss; nothing where the network cannot be differentiated twice.

    Args:
        context: model, loss and sites.
        pilot: samples to try it on.
        seed: of the random vectors.
        samples: how many of them.
    """
    few = pilot.first(context, samples)

    def forms(sites: Sequence[str], linearised: bool) -> dict[str, float]:
        """``z^T H z`` of the loss, or of the loss made linear in the outputs: what the traces leave out."""
        direction = loss_gradient if linearised else None
        sampler = rademacher(torch.Generator().manual_seed(seed))
        with random_states_kept(seed), gradients_of(context, few.batch, few.per_sample, direction, sites=sites) as g:
            last = _read_last(g.forward) if direction is None else sites
            found = {}
            for site in [s for s in g.points if s in last][:_MOST]:
                z = [sampler(p) for p in g.points[site]]
                found[site] = sum(float((v * h).sum()) for v, h in zip(z, g.product(site, z)))
            outputs[:] = [n or "the model" for n in g.forward.hessian.names]
            return found

    outputs: list[str] = []
    overwritten = context.diagnostics.overwritten

    def compare() -> None:
        true = with_copies(overwritten, lambda: forms([s.name for s in context.table.weights], False))
        missed = with_copies(overwritten, lambda: forms(list(true), True))
        for site, value in true.items():
            counted = value - missed[site]
            if abs(missed[site]) > _DISAGREES * max(abs(value), abs(counted)):
                context.diagnostics.warn_once(
                    f"The traces and the true Hessian disagree: on {few.samples} images one product of a random vector "
                    f"with it is {value:.3g} at {site}, of which the traces count {counted:.3g}. Curvature was missed "
                    f"in front of the output of {', '.join(dict.fromkeys(outputs))}; estimator='hessian' counts it."
                )
                return

    try:
        if isinstance(attempt(compare), RanOut):
            return
    except (HawqError, RuntimeError, NotImplementedError):  # no second derivative of something
        return


def _read_last(forward: ForwardPass) -> set[str]:
    """Weight sites that the loss follows from with no other one in between."""
    assert forward.loss is not None
    site_of: dict[Node, str] = {n: s for s, nodes in forward.network.output_nodes().items() for n in nodes}
    return {site_of[n] for n in walk([forward.loss.grad_fn], site_of) if n in site_of}
