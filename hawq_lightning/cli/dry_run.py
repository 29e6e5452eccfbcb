"""A look before the leap: sites, what budgets can be met, and how long the measurement will take."""

from __future__ import annotations

import math
import time
from typing import Any

import lightning.pytorch as pl
import torch
from omegaconf import DictConfig

from hawq_lightning.cli.parts import check_settings, make_callback, make_data, make_task
from hawq_lightning.errors import HawqError
from hawq_lightning.export import packed_overhead
from hawq_lightning.sensitivity import measure
from hawq_lightning.sensitivity.result import Sensitivity
from hawq_lightning.site_table import SiteTable
from hawq_lightning.sites import sites

_TRIAL_ERROR = 9.0  # as good as no demand: the trial stops after the first probes


def dry_run(cfg: DictConfig) -> None:
    """Print the site table, the range of every budget and a time estimate. Nothing is written.

    Raises:
        HawqError: bad input of any kind.
    """
    check_settings(cfg)
    pl.seed_everything(cfg.seed, workers=True, verbose=False)
    data, task = make_data(cfg), make_task(cfg)
    callback = make_callback(cfg)
    include, exclude = callback.measurer.include, callback.measurer.excluded(task)
    data.prepare_data()
    data.setup("fit")
    batch = next(iter(data.train_dataloader()), None)
    if batch is None:
        raise HawqError("The training dataloader is empty.")
    table = sites(task, batch, include=include, exclude=exclude)
    print(table)
    print()
    overhead = packed_overhead(task, table, callback.measurer.quantizer)
    for line in budget_ranges(table, sorted(callback.measurer.weight_bits), overhead):
        print(line)
    start = time.perf_counter()
    trial = measure(
        task,
        [batch],
        _loss,
        sites=table,
        estimator=cfg.sensitivity.estimator,
        rtol=_TRIAL_ERROR,
        seed=cfg.seed,
        progress=False,
    )
    seconds = estimate_seconds(trial, time.perf_counter() - start, cfg.sensitivity.images, cfg.sensitivity.rtol)
    print(
        f"traces: about {_duration(seconds)} for {cfg.sensitivity.images} images at rtol={cfg.sensitivity.rtol} "
        f"({cfg.sensitivity.estimator}, {torch.get_num_threads()} threads), extrapolated from one batch"
    )


def _loss(module: Any, batch: Any) -> torch.Tensor:
    return module.training_step(batch, 0)


def budget_ranges(table: SiteTable, weight_bits: list[int], overhead: int) -> list[str]:
    """One line a budget: the smallest and the largest plan that these weight widths allow.

    Args:
        table: of the model.
        weight_bits: ascending.
        overhead: bytes of the packed file that no choice changes.
    """
    elements = sum(s.numel for s in table.weights)
    scales = 4 * sum(s.channels for s in table.weights)

    def codes(bits: int) -> int:
        return sum(math.ceil(s.numel * bits / 8) for s in table.weights)

    low, high = codes(weight_bits[0]), codes(weight_bits[-1])
    return [
        f"weights: {elements:,} in {len(table.weights)} sites, {4 * elements:,} bytes in float32",
        f"weight_bytes: {low:,} to {high:,}; budgets from {4 * elements / high:.4g}x to {4 * elements / low:.4g}x, "
        f"{weight_bits[0]}bit to {weight_bits[-1]}bit",
        f"file_bytes: {low + scales + overhead:,} to {high + scales + overhead:,}; budgets from "
        f"{(low + scales + overhead) / 2**20:.4f}MiB to {(high + scales + overhead) / 2**20:.4f}MiB",
    ]


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
