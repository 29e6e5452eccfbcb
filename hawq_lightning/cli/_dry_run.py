"""A look before the leap: sites, what budgets can be met, and how long the measurement will take."""

from __future__ import annotations

import time
from dataclasses import replace

import lightning.pytorch as pl
import torch
from omegaconf import DictConfig
from torch import nn

from hawq_lightning._errors import HawqError
from hawq_lightning._progress import seconds_since
from hawq_lightning._site_table import SiteTable
from hawq_lightning._types import Batch
from hawq_lightning.callbacks import HAWQ, preview
from hawq_lightning.cli._build import check_settings, hooks_of, make_callback, make_data, make_task
from hawq_lightning.selection import Problem, available_costs, cost_of, cost_rows, format_cost, solve
from hawq_lightning.sensitivity import Sensitivity, measure

_WHOLE = "model_bytes"  # of more than the sites
_TRIAL_ERROR = 9.0  # as good as no demand: the trial stops after the first probes


def dry_run(cfg: DictConfig) -> None:
    """Print the site table, the range of every budget and a time estimate. Nothing is written.

    Raises:
        HawqError: bad input of any kind.
    """
    check_settings(cfg)
    pl.seed_everything(cfg.seed, workers=True, verbose=False)
    task, callback = make_task(cfg), make_callback(cfg)
    config = callback.measure_callback.measure
    batch, table, problem = first_look(callback, task, make_data(cfg))
    print(table)
    print()
    for line in (*budget_ranges(problem), range_of(problem, _WHOLE)):
        print(line)
    if callback.measure_callback.without_traces:
        print(f"traces: none, which the selector {callback.measure_callback.select.selector!r} does not read")
        return
    start = time.perf_counter()
    trial = measure(task, [batch], _loss, config=replace(config, rtol=_TRIAL_ERROR), sites=table, progress=False)
    seconds = estimate_seconds(trial, seconds_since(start), config.images, config.rtol)
    print(
        f"traces: about {_duration(seconds)} for {config.images} images at rtol={config.rtol} "
        f"({config.estimator}, {torch.get_num_threads()} threads), extrapolated from one batch"
    )


def _loss(module: nn.Module, batch: Batch) -> torch.Tensor:
    loss: torch.Tensor = module.training_step(batch, 0)  # type: ignore[operator]
    return loss


def first_look(
    callback: HAWQ, task: pl.LightningModule, data: pl.LightningDataModule | None
) -> tuple[Batch, SiteTable, Problem]:
    """A batch, the sites, and the problem before anything is measured.

    Raises:
        HawqError: no data, no sites, or a budget that no plan meets.
    """
    hooks = hooks_of(task, data)
    hooks.prepare_data()
    hooks.setup("fit")
    batch = next(iter(hooks.train_dataloader()), None)
    if batch is None:
        raise HawqError("The training dataloader is empty.")
    measuring = callback.measure_callback
    return batch, *preview(measuring.quantizer, measuring.select, task, batch, _loss, size_of=measuring.measure.samples)


def budget_ranges(problem: Problem) -> list[str]:
    """One line a cost of the sites: the smallest and the largest plan that widths and constraints allow."""
    names = [n for n in available_costs(problem) if n != _WHOLE and len(cost_rows(problem, n)) == 1]
    return [range_of(problem, name) for name in names]


def range_of(problem: Problem, name: str) -> str:
    """The smallest and the largest plan by one cost.

    Raises:
        HawqError: no plan is possible.
    """
    (row,) = cost_rows(problem, name)
    ends = [solve(problem, objective=row, maximize=most) for most in (False, True)]
    if None in ends:
        raise HawqError("No plan exists at all: the device's pairs and tables leave no common choice.")
    low, high = (format_cost(problem, name, cost_of(problem, name, c)) for c in ends if c is not None)
    return f"{name}: {low} to {high}" if low != high else f"{name}: {low}"


def estimate_seconds(trial: Sensitivity, seconds: float, images: int, rtol: float) -> float:
    """Time for all images, from a trial on one batch: variance falls as images times probes grow.

    Args:
        trial: the traces of the trial.
        seconds: it took.
        images: of the real measurement.
        rtol: of the real measurement.
    """
    probes, seen = int(trial.settings["probes"]), int(trial.settings["images"])
    errors = [r.stderr / r.trace for r in trial if r.trace > 0]
    worst = max(errors, default=rtol)
    needed = max(probes, probes * (worst / rtol) ** 2 * seen / images)
    return seconds * (images / seen) * (needed / probes)


def _duration(seconds: float) -> str:
    return (
        f"{seconds:.0f} s"
        if seconds < 120
        else f"{seconds / 60:.0f} min"
        if seconds < 7200
        else f"{seconds / 3600:.1f} h"
    )
