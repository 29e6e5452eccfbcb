"""Gauss-Newton traces, and the exact ones of the outputs: Tr(J_l^T H_f J_l), H_f the loss's Hessian at the outputs f.

Equal to the Hessian's trace wherever the network is piecewise linear in each layer's weights (convolution, linear,
ReLU, max and average pooling, BatchNorm in evaluation mode), and the Gauss-Newton approximation elsewhere
(Schraudolph, Neural Computation 14, 2002). Never negative for convex losses.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from hawq_lightning._config import MeasureConfig
from hawq_lightning._errors import HawqError
from hawq_lightning._types import Batch
from hawq_lightning.sensitivity._context import MeasureContext
from hawq_lightning.sensitivity._estimator import (
    Estimator,
    Pilot,
    ProbeRequest,
    Probes,
    Rows,
    register_estimator,
)
from hawq_lightning.sensitivity._memory import RanOut, attempt
from hawq_lightning.sensitivity._output_probes import (
    FactoredPass,
    RademacherProbes,
    concave_share,
    factored_probes,
    output_curvature_of,
)
from hawq_lightning.sensitivity._process_shard import ProcessShard

MAX_COLUMNS = 4096  # backward passes a batch; as many take some minutes for ResNet20
_SLIGHT = 0.05  # share of concave curvature up to which it need not be probed every time
_CONCAVE_EVERY = 8  # it then counts so often in every eighth probe: one backward pass a probe instead of two


@register_estimator("ggn")
class GaussNewton(Estimator):
    """One backward pass a probe: rows are ``||J_l^T L z||^2``, z random signs at the outputs.

    A loss that is concave in places takes a second backward pass for that part; where the part is small, it goes back
    with every eighth probe only and counts eight times, which leaves the mean as it is.

    Args:
        rotate: signs onto the softmax factor's singular vectors.
        period: the concave part goes back with every so many probes, and counts as often.
    """

    per_sample_weights = can_sample = from_outputs = low_precision = quadratic_forms = True

    def __init__(self, rotate: bool = True, period: int = 1) -> None:
        self._rotate, self.period = rotate, period
        self._elementwise: set[int] = set()  # batches whose loss is: their next step need not find out again

    def prepare(self, context: MeasureContext, pilot: Pilot, config: MeasureConfig) -> Estimator:
        """One with the signs of the config."""
        return GaussNewton(config.rotate)

    def calibrate(
        self, context: MeasureContext, batches: Sequence[Batch], shard: ProcessShard, probes: int
    ) -> Estimator:
        """Decide how often the concave part goes back, by its share in the first batch of every process."""
        if probes < 2 * _CONCAVE_EVERY:
            return self
        shares = attempt(lambda: concave_share(context, batches[0]) if batches else (0.0, 0.0))
        # out of memory: as if all were concave, which is right for every loss
        table = shard.sum(torch.tensor((1.0, 1.0) if isinstance(shares, RanOut) else shares, dtype=torch.float64))
        slight = 0 < float(table[0]) <= _SLIGHT * float(table[1])
        return GaussNewton(self._rotate, _CONCAVE_EVERY if slight else 1)

    def concave_weight(self, probe: int) -> float:
        """How often the concave part counts in a probe."""
        return 0.0 if probe % self.period else float(self.period)

    def probe(self, context: MeasureContext, request: ProbeRequest) -> Probes:
        """See :meth:`Estimator.probe`."""
        signs = RademacherProbes(request.seeds)
        weights = [self.concave_weight(request.first_probe + k) for k in range(request.probes)]

        def run(factored: FactoredPass) -> None:
            send_signs(factored, signs, weights, self._rotate)
            if factored.elementwise and request.batch_number is not None:
                self._elementwise.add(request.batch_number)

        return factored_probes(context, request, run, elementwise=request.batch_number in self._elementwise)

    def every_column(self) -> Estimator:
        """See :meth:`Estimator.every_column`."""
        return _EveryColumn()

    def sample_curvature(self, context: MeasureContext, batch: Batch) -> torch.Tensor | None:
        """See :meth:`Estimator.sample_curvature`."""
        return output_curvature_of(context, batch)


def send_signs(factored: FactoredPass, signs: RademacherProbes, weights: Sequence[float], rotate: bool) -> None:
    """Append the rows of one probe for each of ``weights``, which say how often the concave part counts in it."""
    generators = signs.generators()
    for k, concave in enumerate(weights):
        z = signs.sample(factored.forward.hessian.values, generators)
        rows = factored.probe(z, rotate=rotate, concave=concave, last=k == len(weights) - 1)
        factored.append(rows)


def gauss_newton_probes(context: MeasureContext, request: ProbeRequest, *, rotate: bool = True) -> Probes:
    """Gauss-Newton rows as they are, every probe whole: for comparisons on a few samples."""
    weights = [1.0] * request.probes
    return factored_probes(
        context, request, lambda factored: send_signs(factored, RademacherProbes(request.seeds), weights, rotate)
    )


@register_estimator("exact")
class AllOutputs(Estimator):
    """Every unit vector of the outputs in the place of random signs: the Gauss-Newton trace without error."""

    exact = per_sample_weights = from_outputs = quadratic_forms = True
    probes_per_step = 1

    def probe(self, context: MeasureContext, request: ProbeRequest) -> Probes:
        """See :meth:`Estimator.probe`; what ``probes`` and ``seeds`` say does not matter.

        Raises:
            HawqError: there are more than 4,096 outputs a sample (a batch, where samples cannot be told apart).
        """

        def run(factored: FactoredPass) -> None:
            total: Rows = {}
            values = factored.forward.hessian.values
            for z in columns(values, request.samples, all(request.per_sample.values())):
                for site, value in factored.probe(z, rotate=False).items():
                    total[site] = total[site] + value if site in total else value
            factored.append(total)

        return factored_probes(context, request, run)


class _EveryColumn(AllOutputs):
    """What Gauss-Newton probes become where columns are so few that random signs would repeat each other."""

    name = GaussNewton.name


def columns(values: Sequence[torch.Tensor], samples: int, by_sample: bool) -> Iterable[list[torch.Tensor]]:
    """Every unit vector of the output; where images are independent, of all images at once.

    Raises:
        HawqError: there are more than 4,096 of them.
    """
    counts = [v.numel() // samples if by_sample else v.numel() for v in values]
    if sum(counts) > MAX_COLUMNS:
        raise HawqError(f"estimator='exact' would need {sum(counts)} backward passes a batch; use 'ggn'.")
    for i, count in enumerate(counts):
        for j in range(count):
            out = [torch.zeros_like(x) for x in values]
            (out[i].view(samples, -1)[:, j] if by_sample else out[i].view(-1)[j : j + 1]).fill_(1.0)
            yield out
