"""Measure every site's trace on given batches, until the standard errors are small enough."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Unpack

from torch import nn

from hawq_lightning._config import MeasureConfig
from hawq_lightning._progress import seconds_since
from hawq_lightning._site_table import SiteTable
from hawq_lightning._types import Batch, LossFn
from hawq_lightning.sensitivity._batch_hash import batches_digest
from hawq_lightning.sensitivity._batch_set import BatchSet
from hawq_lightning.sensitivity._checkpoint import MeasurementCheckpoint
from hawq_lightning.sensitivity._heap import pages_kept, release_memory
from hawq_lightning.sensitivity._isolate import isolated_eval
from hawq_lightning.sensitivity._parameter_flags import again_if_needed
from hawq_lightning.sensitivity._prepare import Reuse, first_look, make_runner
from hawq_lightning.sensitivity._process_shard import ProcessShard
from hawq_lightning.sensitivity._repeatable import repeatable
from hawq_lightning.sensitivity._result import Sensitivity
from hawq_lightning.sensitivity._rounding import RoundingErrors
from hawq_lightning.sensitivity._run_loop import run_loop
from hawq_lightning.sensitivity._settings import MeasureOverrides, MeasureSettings
from hawq_lightning.sensitivity._statistics import TraceStatistics
from hawq_lightning.sensitivity._stopping import default_rule
from hawq_lightning.sensitivity._summary import check_curvature, check_rows, settings_record, to_sensitivity
from hawq_lightning.sensitivity._trace_loop import TraceLoop

Resume = str | Path | Callable[[str], str | Path | None]


def measure(
    model: nn.Module,
    batches: Iterable[Batch],
    loss_fn: LossFn,
    *,
    config: MeasureConfig | None = None,
    sites: SiteTable | None = None,
    progress: bool = True,
    shard: ProcessShard | None = None,
    reuse: Reuse | None = None,
    resume: Resume | None = None,
    **overrides: Unpack[MeasureOverrides],
) -> Sensitivity:
    """Average Hessian traces of every weight and activation (paper 2.1, 2.2), with standard errors.

    Plain PyTorch: the model is left exactly as it was (modes, buffers, gradients, random states).

    Args:
        model: any module; dropout is off and BatchNorm uses running statistics while measuring.
        batches: any iterable of batches, all kept in memory; each is a unit of the loss. Where memory runs out they are
            taken in parts, if the loss is a mean or sum over samples that does not couple them. A DataLoader that
            shuffles gives others every time: ``list(loader)`` are the same for :func:`hawq_lightning.candidates`.
        loss_fn: ``loss_fn(model, batch) -> scalar``, a mean over samples or any other reduction.
        config: how to measure; of its fields ``images``, ``stop_when``, ``loss_per_site``, ``quadratic_forms``,
            ``loss_fn`` and ``cache`` are for the callback.
        sites: what to measure; found by a forward pass of the first batch when not given.
        progress: show a bar.
        shard: of this process, where several measure together; the result does not depend on their number.
        reuse: fingerprint -> an earlier measurement of the same weights, data and settings, or ``None``.
        resume: file to keep unfinished rows in, or a function from the fingerprint to it; an interrupted call with the
            same arguments goes on from there.
        **overrides: fields of :class:`hawq_lightning.MeasureConfig` by name, such as ``rtol=0.02`` or
            ``estimator="exact"``, and what is no setting: ``include`` and ``exclude`` (which layers, see
            :func:`hawq_lightning.sites`), ``batch_size_fn`` (samples in a batch), and ``stop``, a function from the
            :class:`Sensitivity` measured so far to whether it will do, such as
            :class:`hawq_lightning.selection.StablePlan`; its ``key``, if it has one, goes into the fingerprint; and
            ``rounding``, from :func:`hawq_lightning.quantization.rounding_errors`: what rounding changes at every site,
            whose quadratic forms are measured in the same passes (:attr:`Sensitivity.forms`).

    Returns:
        one record a site; traces are of the loss as given, averaged over batches in proportion to their samples.

    Raises:
        HawqError: no batches, no quantizable layer, a loss that is no finite scalar or does not depend on the model,
            weights that hold NaN, no curvature anywhere, unknown setting, estimator or pattern.
    """
    settings = MeasureSettings.of(config, overrides)
    config, began = settings.config, time.perf_counter()
    data = BatchSet.of(model, batches, settings.batch_size_fn, shard)
    progress = progress and data.shard.rank == 0
    with pages_kept(), isolated_eval(model, config.seed):
        settled = repeatable(model, loss_fn)
        look = again_if_needed(lambda: first_look(model, data, settled, sites, settings, reuse))
        if look.earlier is not None:
            return look.earlier
        runner = make_runner(look, data, settings)
        estimator, diagnostics, key = runner.estimator, look.context.diagnostics, look.fingerprint
        del look  # with the first batch
        path = resume(key) if callable(resume) else resume
        checkpoint = MeasurementCheckpoint(path, key, data.shard, diagnostics)
        release_memory()  # what it took to get ready
        stop = settings.stop
        enough = None if stop is None else lambda rows: stop(to_sensitivity(rows, key))
        loop = TraceLoop(data, estimator, default_rule(config, enough), checkpoint, progress, config.rtol)
        unit = estimator.row_unit(runner.context, runner.per_sample)
        rounding = runner.context.rounding or RoundingErrors({})
        counts = {s.name: rounding.count(s.name) for s in runner.context.table}
        sampling, final = run_loop(
            loop, runner, config.sampling, TraceStatistics(runner.context.table, data.samples, unit, counts)
        )
        if reuse is None:  # else whoever looks for earlier results deletes it once this one is saved
            checkpoint.delete()
    if loop.stopped.note:
        diagnostics.warn_once(loop.stopped.note)
    check_curvature(final.records(), diagnostics)
    check_rows(final, diagnostics)
    seconds = seconds_since(began)
    record = settings_record(config, runner, sampling, final, loop.stopped.reason, seconds)
    measured = to_sensitivity(final, key, exact=estimator.exact, settings=record, notes=diagnostics.notes)
    forms = final.form_records(rounding.candidates, estimator.exact)
    return replace(measured, forms=forms, data=batches_digest(data.batches.kept))
