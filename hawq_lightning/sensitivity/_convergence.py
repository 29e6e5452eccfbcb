"""What the paper's convergence figures need: traces step by step, and the loss around a minimum."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn

from hawq_lightning._batches import batch_images
from hawq_lightning._errors import HawqError
from hawq_lightning._site_table import SiteTable
from hawq_lightning._sites import find_sites, quantizable_layers
from hawq_lightning.sensitivity._context import LossFn, MeasureContext
from hawq_lightning.sensitivity._ggn import independent_images
from hawq_lightning.sensitivity._isolate import isolated_eval, to_device
from hawq_lightning.sensitivity._microbatch import ImagesOf
from hawq_lightning.sensitivity._probe_runner import PROBES_PER_STEP, ProbeRunner


def trace_history(
    model: nn.Module,
    batches: Iterable[Any],
    loss_fn: LossFn,
    *,
    steps: int = 50,
    estimator: str = "hutchinson",
    sites: SiteTable | None = None,
    seed: int = 0,
    batch_size_fn: ImagesOf = batch_images,
) -> dict[str, list[float]]:
    """One estimate of every trace a step, from the same images each time (paper, Fig. 5 right and Fig. 8).

    Args:
        model: left as it was.
        batches: the images.
        loss_fn: ``loss_fn(model, batch) -> scalar``.
        steps: random vectors.
        estimator: ``hutchinson``, as in the paper, or ``ggn``.
        sites: found when not given.
        seed: of the vectors.
        batch_size_fn: number of images in a batch.

    Returns:
        site -> one estimate a step; their running mean is what converges.
    """
    if estimator not in ("hutchinson", "ggn"):
        raise HawqError(f"Unknown estimator {estimator!r}; steps are of 'hutchinson' or 'ggn'.")
    if steps < 2:
        raise HawqError(f"steps is {steps}; convergence needs at least 2.")
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    kept = [to_device(b, device) for b in batches]
    if not kept:
        raise HawqError("No batches to measure on: the dataloader or iterable is empty.")
    images = [batch_size_fn(b) for b in kept]
    with isolated_eval(model, seed):
        table = sites or find_sites(model, lambda: loss_fn(model, kept[0]), images[0])
        layers, _ = quantizable_layers(model)
        setting = MeasureContext(model, {x.name: layers[x.name] for x in table.layers}, table, loss_fn)
        probes = ProbeRunner(
            setting, estimator, independent_images(setting, kept[0], images[0]), batch_size_fn, seed=seed
        )
        out = {s.name: [0.0] * (steps + steps % 2) for s in table}
        for turn in range((steps + 1) // PROBES_PER_STEP):
            for number, (batch, n) in enumerate(zip(kept, images)):
                for k, rows in enumerate(probes.of_batch(batch, n, number, turn)[0]):
                    for site, values in rows.items():
                        out[site][turn * PROBES_PER_STEP + k] += float(values.sum()) * n / sum(images)
    return {n: v[:steps] for n, v in out.items()}


def landscape(
    model: nn.Module,
    batches: Iterable[Any],
    loss_fn: LossFn,
    weight: torch.Tensor,
    directions: tuple[torch.Tensor, torch.Tensor],
    offsets: Sequence[float],
    *,
    batch_size_fn: ImagesOf = batch_images,
    tick: Callable[[], None] | None = None,
) -> list[list[float]]:
    """The mean loss with ``weight`` moved by ``a * first + b * second`` for all pairs of offsets (paper, Fig. 2 and 7).

    Args:
        model: left as it was.
        batches: the images.
        loss_fn: ``loss_fn(model, batch) -> scalar``.
        weight: the parameter to move.
        directions: two tensors of its shape, such as eigenvectors.
        offsets: along both.
        batch_size_fn: number of images in a batch.
        tick: called after every row.

    Returns:
        loss[i][j] at ``offsets[i]`` along the first direction and ``offsets[j]`` along the second.
    """
    kept = [to_device(b, weight.device) for b in batches]
    images = [batch_size_fn(b) for b in kept]
    home = weight.detach().clone()
    out = []
    with isolated_eval(model), torch.no_grad():
        try:
            for a in offsets:
                row = []
                for b in offsets:
                    weight.copy_(home + a * directions[0].to(home) + b * directions[1].to(home))
                    row.append(sum(float(loss_fn(model, x)) * n for x, n in zip(kept, images)) / sum(images))
                out.append(row)
                if tick is not None:
                    tick()
        finally:
            weight.copy_(home)
    return out
