"""The paper's estimator: Hutchinson's method on the true Hessian, one layer at a time (eq. 6-9).

z^T H_l z for random z, the Hessian-vector product by double backward through the network. Of the loss itself it is the
check of all other estimators, and slow. Of the loss made linear in the network's outputs it gives only what
Gauss-Newton probes leave out, so that the sum of both is the true trace with little noise.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch

from hawq_lightning.sensitivity._context import MeasureContext
from hawq_lightning.sensitivity._double_backward import GradGraph, Sampler, loss_slope, rademacher, slopes_of
from hawq_lightning.sensitivity._ggn import RademacherProbes, probe_batch

Record = Callable[[dict[str, torch.Tensor]], None]


def hutchinson_batch(
    setting: MeasureContext,
    batch: Any,
    images: int,
    per_image: Mapping[str, bool],
    sample: Sampler,
    steps: int,
    record: Record,
    *,
    linearised: bool = False,
    only: Collection[str] | None = None,
) -> dict[str, torch.Tensor]:
    """Record ``steps`` estimates of every site for one batch.

    Weight rows are batches; activation rows are images where images are independent, since then eq. 9 holds.

    Args:
        setting: model, loss and sites.
        batch: one batch.
        images: its size.
        per_image: site -> whether its rows are images (never for weights).
        sample: draws the random vectors.
        steps: how many.
        record: gets the rows of each.
        linearised: of the linearised loss: the part of the Hessian that Gauss-Newton leaves out.
        only: sites to work on; all by default.

    Returns:
        activation site -> elements of each row.
    """
    direction = loss_slope if linearised else None
    with slopes_of(setting, batch, per_image, direction, sites=only) as slopes:
        for _ in range(steps):
            record({s: _quadratic_form(slopes, s, sample, per_image[s], images) for s in slopes.points})
        return {s: slopes.step.network.sizes(s, images) for s in slopes.points if s in slopes.step.network.aliases()}


def hessian_batch(
    setting: MeasureContext,
    batch: Any,
    images: int,
    per_image: Mapping[str, bool],
    seed: int,
    probes: int,
    record: Record,
    *,
    curved: Collection[str],
    rotate: bool = True,
) -> dict[str, torch.Tensor]:
    """Record ``probes`` estimates of the true trace: Gauss-Newton probes plus Hutchinson on the linearised loss.

    Args:
        setting: model, loss and sites.
        batch: one batch.
        images: its size.
        per_image: as the Gauss-Newton probes have it; here weight rows are batches all the same.
        seed: of all random vectors.
        probes: how many.
        record: gets the rows of each.
        curved: sites where Gauss-Newton is not all; elsewhere it is exact.
        rotate: as for the Gauss-Newton probes.

    Returns:
        activation site -> elements of each row.
    """
    probed = probe_batch(setting, batch, images, per_image, RademacherProbes([(images, seed)]), probes, rotate=rotate)
    found = probed.rows
    weights = {s.name for s in setting.table.weights}
    for rows in found:
        for site in weights & rows.keys():
            rows[site] = rows[site].sum()[None]
    if curved:
        missing: list[dict[str, torch.Tensor]] = []
        own = {n: per and n not in weights for n, per in per_image.items()}
        hutchinson_batch(
            setting, batch, images, own, rademacher(torch.Generator().manual_seed(seed + 1)), probes, missing.append,
            linearised=True, only=curved,
        )  # fmt: skip
        for rows, more in zip(found, missing):
            for site, value in more.items():
                rows[site] = rows[site] + value if site in rows else value
    for rows in found:
        record(rows)
    return probed.sizes


def _quadratic_form(slopes: GradGraph, site: str, sample: Sampler, per_image: bool, images: int) -> torch.Tensor:
    total = torch.zeros(images if per_image else 1, dtype=torch.float64)
    z = [sample(p) for p in slopes.points[site]]
    for v, h in zip(z, slopes.product(site, z)):
        part = (v * h).to(torch.float64)
        total += (part.flatten(1).sum(1) if per_image else part.sum()[None]).cpu()
    return total
