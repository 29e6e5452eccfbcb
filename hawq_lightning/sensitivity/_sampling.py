"""Which samples to send back in a step: in proportion to the curvature of the loss at their outputs.

In a trained network few samples carry the traces: the loss of a confident one is flat. A forward pass over all of them
gives ``h = tr(|d2 loss / d output2|)`` of each, which follows its traces closely; a sample is then drawn with a
probability ``pi`` that grows with ``h``, independently in every step, and what it gives is divided by ``pi`` (Horvitz
and Thompson, JASA 47, 1952): unbiased whatever ``pi`` is, since none is zero. Samples that carry much have ``pi = 1``
and add no noise of sampling at all.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

_PROBE_NOISE = 0.5  # squared relative deviation of one probe of one sample, rotated: 0.42 on ResNet20
_FLOOR = 0.1  # share of the draws that goes to samples evenly: curvature is a guide, not the truth
_LEAST_GAIN = 1.5  # for which samples are drawn: a third of the work saved
_FEWEST = 16  # samples a step: smaller passes are all overhead


@dataclass(frozen=True)
class SamplingDesign:
    """How likely every sample is in a step.

    Attributes:
        probability: (samples,), in (0, 1].
        gain: noise at equal work of all samples, over that of this design, as far as the curvature predicts it.
    """

    probability: torch.Tensor
    gain: float


def sampling_design(curvature: torch.Tensor) -> SamplingDesign:
    """Inclusion probabilities that give the least noise for the work, if traces were as ``curvature``.

    Noise of a step is ``sum ((1 + k) / pi - 1) t^2`` with ``k`` a probe's noise, its work ``sum pi``; their product
    does not depend on how many steps are run. ``pi = min(1, s a)`` with ``a`` the curvature and an even floor.

    Args:
        curvature: (samples,), not negative.
    """
    h = curvature.double().clamp_min(0)
    count = len(h)
    if count == 0 or not float(h.sum()) > 0:
        return SamplingDesign(torch.ones(count, dtype=torch.float64), 1.0)
    a = (1 - _FLOOR) * h / h.mean() + _FLOOR
    squares = a.square()
    whole = count * _PROBE_NOISE * float(squares.sum())
    best, least = torch.ones_like(a), whole
    fewest = min(count, _FEWEST)
    for exponent in torch.linspace(0.0, 1.0, 65, dtype=torch.float32).tolist():
        scale = float(a.max()) ** -1.0 * float(a.max() / a.min()) ** exponent
        pi = (scale * a).clamp_max(1.0)
        if float(pi.sum()) < fewest:
            continue
        product = float(pi.sum()) * float((squares * ((1 + _PROBE_NOISE) / pi - 1)).sum())
        if product < least:
            best, least = pi, product
    return SamplingDesign(best, whole / least)


def pays_off(plan: SamplingDesign) -> bool:
    """Whether drawing samples saves so much work that the forward pass over all of them is worth it."""
    return plan.gain >= _LEAST_GAIN
