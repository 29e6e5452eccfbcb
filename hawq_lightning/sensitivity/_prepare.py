"""What is known before the first probe: sites, fingerprint, which samples can be told apart, and the estimator."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain

from torch import nn

from hawq_lightning._errors import HawqError
from hawq_lightning._site_table import SiteTable
from hawq_lightning._sites import find_sites, quantizable_layers
from hawq_lightning._types import LossFn
from hawq_lightning._values import check_has_values
from hawq_lightning.sensitivity._batch_set import BatchSet
from hawq_lightning.sensitivity._boundary_check import check_boundary, check_samples
from hawq_lightning.sensitivity._cache import fingerprint
from hawq_lightning.sensitivity._context import MeasureContext, check_weights, outputs_of
from hawq_lightning.sensitivity._estimator import ESTIMATORS, Pilot
from hawq_lightning.sensitivity._first_loss import check_float, note_float_layers
from hawq_lightning.sensitivity._independence import later_batches_couple, samples_apart
from hawq_lightning.sensitivity._memory import RanOut, half, with_fewer
from hawq_lightning.sensitivity._microbatch import slice_batch
from hawq_lightning.sensitivity._precision import in_precision
from hawq_lightning.sensitivity._probe_runner import ProbeRunner
from hawq_lightning.sensitivity._repeatable import settle_draws
from hawq_lightning.sensitivity._result import Sensitivity
from hawq_lightning.sensitivity._settings import MeasureSettings

Reuse = Callable[[str], Sensitivity | None]
"""From the fingerprint to an earlier measurement of the same, or ``None``."""


_FEW_COLUMNS = 12  # outputs of all rows together: then each is sent back by itself, and the traces have no error


@dataclass(frozen=True)
class FirstLook:
    """What a first forward pass tells.

    Attributes:
        context: model, loss and sites.
        pilot: the first batch, or as much of it as memory holds; ``per_sample`` is empty if there is an earlier result.
        fingerprint: of weights, data, loss and settings.
        earlier: a measurement of the same fingerprint.
    """

    context: MeasureContext
    pilot: Pilot
    fingerprint: str
    earlier: Sensitivity | None = None


def first_look(
    model: nn.Module,
    data: BatchSet,
    loss_fn: LossFn,
    sites: SiteTable | None,
    settings: MeasureSettings,
    reuse: Reuse | None,
) -> FirstLook:
    """Look at the first batch, at half of it for as long as memory runs out.

    Args:
        model: evaluated in isolation.
        data: all batches.
        loss_fn: ``loss_fn(model, batch) -> scalar``.
        sites: found by a forward pass when not given.
        settings: of the measurement.
        reuse: asked for an earlier measurement.

    Raises:
        HawqError: no quantizable layer, weights that hold NaN, or a loss that cannot be measured.
    """
    check_has_values(model, "measure")
    layers, _ = quantizable_layers(model, settings.include, settings.exclude)
    check_weights(layers)
    batch, samples, size_of = data.batches[0], data.samples[0], settings.batch_size_fn

    def look(size: int) -> FirstLook:
        part = batch if size == samples else slice_batch(batch, samples, 0, size, size_of)

        def find() -> SiteTable:
            return find_sites(
                model, lambda: loss_fn(model, part), size, settings.include, settings.exclude,
                later=((partial(loss_fn, model, b), n) for b, n in zip(data.batches[1:], data.samples[1:])),
            )  # fmt: skip

        table = sites or find()
        if sites is None and settle_draws(model, loss_fn, table, chain((part,), data.batches[1:])):
            table = find()
        context = MeasureContext.of(model, table, loss_fn, settings.config.l1_curvature)
        check_float(context)
        note_float_layers(context)
        key = fingerprint(context, data.batches, data.samples, part, settings.text(), settings.config.seed)
        earlier = reuse(key) if reuse is not None else None
        apart = {} if earlier is not None else samples_apart(context, part, size, size_of)
        if any(apart.values()) and later_batches_couple(context, data.batches, data.samples):
            apart = dict.fromkeys(apart, False)
        return FirstLook(context, Pilot(part, size, apart, size_of), key, earlier)

    def fewer(size: int, ran_out: RanOut) -> int:
        size = half(size, ran_out)
        if slice_batch(batch, samples, 0, size, size_of) is None:
            raise ran_out.error
        return size

    return with_fewer(look, samples, fewer)[0]


def make_runner(look: FirstLook, data: BatchSet, settings: MeasureSettings) -> ProbeRunner:
    """The estimator, prepared and calibrated, in the precision that it may have, on as many samples as memory holds.

    Args:
        look: at the first batch.
        data: all batches.
        settings: of the measurement.

    Raises:
        HawqError: the network or the loss does not allow what the settings demand.
    """
    config, pilot = settings.config, look.pilot
    estimator = ESTIMATORS[config.estimator].prepare(look.context, pilot, config)
    if look.context.diagnostics.differentiates and not estimator.whole_loss:
        raise HawqError(
            f"The loss takes derivatives of the network, whose curvature estimator={estimator.name!r} cannot see: use "
            "'auto' or 'hutchinson', or a loss_fn without them (callbacks take it as MeasureConfig(loss_fn=...))."
        )
    look.context.diagnostics.tell_past_layers(estimator.whole_loss)
    if estimator.from_outputs:
        few = check_samples(sum(data.samples), config.max_probes)
        check_boundary(look.context, pilot, config.seed, few)
    context = in_precision(look.context, estimator, pilot, config.precision, config.seed)
    whole = pilot.samples == data.samples[0]
    runner = ProbeRunner(
        context, estimator, pilot.per_sample, settings.batch_size_fn, config.seed, None if whole else pilot.samples
    )
    if not whole:
        runner.enable_microbatching(data.batches[0], data.samples[0], pilot.samples)
    first = [data.batches[b] for b in data.local[:1]]
    runner.estimator = estimator.calibrate(context, first, data.shard, config.max_probes)
    if whole and config.sampling != "curvature" and _few_columns(runner, data):
        runner.estimator = runner.estimator.every_column() or runner.estimator
    if settings.rounding is not None and runner.estimator.quadratic_forms:
        runner.context = replace(context, rounding=settings.rounding)
    elif settings.rounding is not None:
        context.diagnostics.warn_once(
            f"estimator={runner.estimator.name!r} sends nothing back from the outputs: there are no quadratic forms of "
            "the rounding errors. Use 'ggn'."
        )
    return runner


def _few_columns(runner: ProbeRunner, data: BatchSet) -> bool:
    """Whether signs are so few, over all rows, that probes soon repeat each other, and their spread means little."""
    context, by_sample = runner.context, all(runner.per_sample.values())
    rows = sum(data.samples) if by_sample else len(data.batches)
    if rows > _FEW_COLUMNS or context.precision != "float32" or runner.estimator.every_column() is None:
        return False
    for batch, samples in zip(data.batches, data.samples):
        with outputs_of(context, batch) as hessian:
            outputs = sum(v.numel() for v in hessian.values)
        if rows * outputs > _FEW_COLUMNS * (samples if by_sample else 1):
            return False
    return True
