"""What the paper's convergence figures need: traces step by step, and the loss around a minimum."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import nn

from hawq_lightning._batches import batch_images
from hawq_lightning._config import MeasureConfig
from hawq_lightning._errors import HawqError
from hawq_lightning._site_table import SiteTable
from hawq_lightning._sites import find_sites
from hawq_lightning._types import Batch, BatchSizeFn, LossFn
from hawq_lightning.sensitivity._batch_set import BatchSet
from hawq_lightning.sensitivity._context import MeasureContext
from hawq_lightning.sensitivity._estimator import ESTIMATORS, Pilot
from hawq_lightning.sensitivity._first_loss import check_float
from hawq_lightning.sensitivity._independence import samples_apart
from hawq_lightning.sensitivity._isolate import isolated_eval
from hawq_lightning.sensitivity._on_device import on_device
from hawq_lightning.sensitivity._probe_runner import ProbeRunner
from hawq_lightning.sensitivity._repeatable import repeatable


def trace_history(
    model: nn.Module,
    batches: Iterable[Batch],
    loss_fn: LossFn,
    *,
    steps: int = 50,
    estimator: str = "hutchinson",
    sites: SiteTable | None = None,
    seed: int = 0,
    batch_size_fn: BatchSizeFn = batch_images,
) -> dict[str, list[float]]:
    """One estimate of every trace a step, from the same samples each time (paper, Fig. 5 right and Fig. 8).

    Args:
        model: left as it was.
        batches: the samples.
        loss_fn: ``loss_fn(model, batch) -> scalar``.
        steps: random vectors.
        estimator: registered name; ``hutchinson`` is the paper's.
        sites: found when not given.
        seed: of the vectors.
        batch_size_fn: number of samples in a batch.

    Returns:
        site -> one estimate a step; their running mean is what converges.

    Raises:
        HawqError: fewer than two steps, an unknown estimator, or one that is exact.
    """
    entry = ESTIMATORS[estimator]
    if entry.exact:
        raise HawqError(f"Estimator {estimator!r} draws nothing, so nothing converges; use hutchinson or ggn.")
    if steps < 2:
        raise HawqError(f"steps is {steps}; convergence needs at least 2.")
    data = BatchSet.of(model, batches, batch_size_fn)
    with isolated_eval(model, seed):
        loss_fn = repeatable(model, loss_fn)
        table = sites or find_sites(model, lambda: loss_fn(model, data.batches[0]), data.samples[0])
        context = MeasureContext.of(model, table, loss_fn)
        check_float(context)
        per_sample = samples_apart(context, data.batches[0], data.samples[0], batch_size_fn)
        pilot = Pilot(data.batches[0], data.samples[0], per_sample, batch_size_fn)
        runner = ProbeRunner(
            context, entry.prepare(context, pilot, MeasureConfig(estimator, seed=seed)), per_sample, batch_size_fn, seed
        )
        history: dict[str, list[float]] = {s.name: [] for s in table}
        while min(map(len, history.values())) < steps:
            step = len(next(iter(history.values()))) // runner.estimator.probes_per_step
            for name, estimates in _step(runner, data, step).items():
                history[name] += estimates
    return {name: estimates[:steps] for name, estimates in history.items()}


def _step(runner: ProbeRunner, data: BatchSet, step: int) -> dict[str, list[float]]:
    """Site -> its trace by each probe of a step."""
    estimates = {s.name: [0.0] * runner.estimator.probes_per_step for s in runner.context.table}
    for number, (batch, samples) in enumerate(zip(data.batches, data.samples)):
        for k, rows in enumerate(runner.probe(batch, samples, number, step).rows):
            for site, values in rows.items():
                estimates[site][k] += float(values.sum()) * samples / sum(data.samples)
    return estimates


def landscape(
    model: nn.Module,
    batches: Iterable[Batch],
    loss_fn: LossFn,
    weight: torch.Tensor,
    directions: tuple[torch.Tensor, torch.Tensor],
    offsets: Sequence[float],
    *,
    batch_size_fn: BatchSizeFn = batch_images,
    tick: Callable[[], None] | None = None,
) -> list[list[float]]:
    """The mean loss with ``weight`` moved by ``a * first + b * second`` for all pairs of offsets (paper, Fig. 2 and 7).

    Args:
        model: left as it was.
        batches: the samples.
        loss_fn: ``loss_fn(model, batch) -> scalar``.
        weight: the parameter to move.
        directions: two tensors of its shape, such as eigenvectors.
        offsets: along both.
        batch_size_fn: number of samples in a batch.
        tick: called after every row.

    Returns:
        loss[i][j] at ``offsets[i]`` along the first direction and ``offsets[j]`` along the second.
    """
    moved = on_device(batches, weight.device)
    samples = moved.samples(batch_size_fn)
    home = weight.detach().clone()
    loss_fn = repeatable(model, loss_fn)
    out = []
    try:
        for a in offsets:
            row = []
            for b in offsets:
                with torch.no_grad():
                    weight.copy_(home + a * directions[0].to(home) + b * directions[1].to(home))
                with isolated_eval(model), torch.no_grad():  # each point its own: the weight is moved outside of it
                    row.append(sum(float(loss_fn(model, x)) * n for x, n in zip(moved, samples)) / sum(samples))
            out.append(row)
            if tick is not None:
                tick()
    finally:
        with torch.no_grad():
            weight.copy_(home)
    return out
