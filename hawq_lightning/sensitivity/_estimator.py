"""What an estimator of traces is: one object that turns a batch into rows, and says what it needs and what it gives.

The loop that runs it, the choice of samples, the statistics and the rules that stop know of estimators no more than
what stands here. An estimator of one's own is a subclass in a file of one's own, see :func:`register_estimator`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, TypeAlias, TypeVar

import torch

from hawq_lightning._config import MeasureConfig
from hawq_lightning._registry import Registry
from hawq_lightning._types import Batch, BatchSizeFn
from hawq_lightning.sensitivity._context import MeasureContext
from hawq_lightning.sensitivity._microbatch import slice_batch
from hawq_lightning.sensitivity._process_shard import ProcessShard

Rows: TypeAlias = dict[str, torch.Tensor]
"""Site -> float64 tensor (rows,): of the loss of the whole batch, so that rows add up to the batch's trace."""

PROBES_PER_STEP = 2  # random vectors that share a forward pass; two give a first standard error


@dataclass(frozen=True)
class ProbeRequest:
    """Samples to probe, and the random numbers to do it with.

    Attributes:
        batch: what the loss gets; a whole batch, a part of one, or samples of several.
        samples: their number.
        per_sample: site -> whether the samples can be told apart there.
        seeds: (number of samples, seed) of each batch that the samples come from, in order; mostly one.
        probes: how many random vectors.
        first_probe: number of the first in the whole measurement.
        batch_number: of a whole batch; ``None`` for anything else.
        curvature: also give :attr:`Probes.curvature`, where it is known.
    """

    batch: Batch
    samples: int
    per_sample: Mapping[str, bool]
    seeds: Sequence[tuple[int, int]]
    probes: int = PROBES_PER_STEP
    first_probe: int = 0
    batch_number: int | None = None
    curvature: bool = False

    def generator(self) -> torch.Generator:
        """A fresh one, of the first seed."""
        return torch.Generator().manual_seed(self.seeds[0][1])


@dataclass
class Probes:
    """What probing gives.

    Attributes:
        rows: of every probe.
        sizes: activation site -> elements of each row (rows,).
        curvature: of the loss at the outputs (samples,): the trace of its absolute Hessian, where that is known.
        forms: of every probe, the same along rounding errors (rows, candidates), where the context has some.
    """

    rows: list[Rows]
    sizes: Rows
    curvature: torch.Tensor | None = None
    forms: list[Rows] = field(default_factory=list)


@dataclass(frozen=True)
class Pilot:
    """The first samples of a measurement, for what must be known before it begins.

    Attributes:
        batch: a batch, or as much of it as memory holds.
        samples: their number.
        per_sample: site -> whether samples can be told apart there.
        batch_size_fn: number of samples in a batch.
    """

    batch: Batch
    samples: int
    per_sample: Mapping[str, bool]
    batch_size_fn: BatchSizeFn

    def first(self, context: MeasureContext, most: int) -> Pilot:
        """The first ``most`` samples, if they can be told apart and the loss takes them; else all."""
        if self.samples <= most or not all(self.per_sample.values()):
            return self
        part = slice_batch(self.batch, self.samples, 0, most, self.batch_size_fn)
        if part is None:
            return self
        try:
            with torch.no_grad():
                float(context.loss_fn(context.model, part))
        except Exception:  # somebody's loss: whatever it raises, the whole batch is what it was made for
            return self
        return Pilot(part, most, self.per_sample, self.batch_size_fn)


class Estimator(ABC):
    """One way to estimate traces.

    Attributes:
        name: that it is registered by.
        exact: one step gives the traces without error.
        second_derivatives: needs the network to be differentiated twice; where it cannot, a clear error says so.
        per_sample_weights: rows of weights are samples where these can be told apart; else they are whole batches.
        can_sample: takes samples of several batches in one request and gives their curvature, so that samples may be
            drawn (``sampling="curvature"``); needs ``per_sample_weights``.
        whole_loss: differentiates the loss itself, whatever it reads of the network.
        from_outputs: counts the loss's curvature in the network's outputs, and none that lies in front of them.
        low_precision: its passes may run in bfloat16.
        quadratic_forms: gives :attr:`Probes.forms`.
        probes_per_step: random vectors that a request for a step holds.
        period: probes after which the mean of their rows is unbiased; in between it need not be.
    """

    name: ClassVar[str] = ""
    exact: ClassVar[bool] = False
    second_derivatives: ClassVar[bool] = False
    per_sample_weights: ClassVar[bool] = False
    can_sample: ClassVar[bool] = False
    whole_loss: ClassVar[bool] = False
    from_outputs: ClassVar[bool] = False
    low_precision: ClassVar[bool] = False
    quadratic_forms: ClassVar[bool] = False
    probes_per_step: ClassVar[int] = PROBES_PER_STEP
    period: int = 1

    def prepare(self, context: MeasureContext, pilot: Pilot, config: MeasureConfig) -> Estimator:
        """The estimator that measures: by default this one, else another or one with settings of ``config``.

        Args:
            context: model, loss and sites.
            pilot: samples to try things on.
            config: settings.
        """
        return self

    def calibrate(
        self, context: MeasureContext, batches: Sequence[Batch], shard: ProcessShard, probes: int
    ) -> Estimator:
        """The estimator with what depends on the data, such as :attr:`period`, decided for all processes together.

        Args:
            context: model, loss and sites.
            batches: the first of this process, if it has any.
            shard: for sums over processes.
            probes: how many there will be at the most.
        """
        return self

    @abstractmethod
    def probe(self, context: MeasureContext, request: ProbeRequest) -> Probes:
        """Rows of ``request.probes`` random vectors, unbiased over the seeds."""

    def every_column(self) -> Estimator | None:
        """The estimator that takes all unit vectors where this one draws random ones; ``None``: there is none."""
        return None

    def sample_curvature(self, context: MeasureContext, batch: Batch) -> torch.Tensor | None:
        """Curvature of the loss at the outputs (samples,), to draw samples by; ``None`` where it is not known."""
        return None

    def row_unit(self, context: MeasureContext, per_sample: Mapping[str, bool]) -> dict[str, bool]:
        """Site -> whether its rows are samples, not batches."""
        batches = set() if self.per_sample_weights else {s.name for s in context.table.weights}
        return {name: told_apart and name not in batches for name, told_apart in per_sample.items()}


ESTIMATORS: Registry[Estimator] = Registry("estimator")
EstimatorClass = TypeVar("EstimatorClass", bound=type[Estimator])


def register_estimator(name: str) -> Callable[[EstimatorClass], EstimatorClass]:
    """Decorator that makes a subclass of :class:`Estimator` known as ``measure(..., estimator=name)``.

    Args:
        name: lower-case letters, digits and underscores; it goes into configs and results.

    Raises:
        HawqError: a malformed name, or another estimator has it.
    """

    def register(estimator: EstimatorClass) -> EstimatorClass:
        estimator.name = name
        ESTIMATORS.add(name, estimator())
        return estimator

    return register
