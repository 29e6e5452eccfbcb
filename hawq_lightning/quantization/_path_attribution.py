"""What a whole plan will cost before it is tried: path attribution of the distance to the float network.

On the way from the float network to the one with all sites at w bits, ``W_l + t (Q_w(W_l) - W_l)``, t from 0 to 1, each
site is charged with what its own move adds:

    ``P[l, w] = integral of < d D(t) / d W_l , Q_w(W_l) - W_l > dt``, D(t) the distance of the outputs at t.

This is the Aumann-Shapley value of the site (Aumann and Shapley, Values of Non-Atomic Games, 1974; as integrated
gradients, arXiv:1703.01365, with rounding errors for the difference to the baseline). Sites that compound each other's
errors share what they do together, which quadratic forms of single sites leave out. ``sum_l P[l, w]`` is the distance
of the uniform network at w bits, the check that :class:`Forecast` brings along, and ``sum_l P[l, w_l]`` forecasts a
plan. D is least at 0, where it has no slope: a point of the integral that needs no pass.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import get_args

import torch
from torch import nn

from hawq_lightning._batches import batch_images
from hawq_lightning._candidates import Candidates
from hawq_lightning._errors import HawqError, choice, nearest
from hawq_lightning._progress import progress_bar
from hawq_lightning._site_table import SiteTable
from hawq_lightning._types import Batch, BatchSizeFn, LossFn
from hawq_lightning.quantization._float_distance import FloatDistance, distance_of_new_statistics
from hawq_lightning.quantization._forecast import After, Forecast, Mode, Tangent
from hawq_lightning.quantization._path import Path
from hawq_lightning.sensitivity import on_device, pages_kept

_BY_BATCH: dict[str, bool] = {"quantizing": False, "batchnorm": True}
_LOBATTO, _RADAU = math.sqrt(0.05), math.sqrt(6)
# the slope at 0, where nothing has moved yet, is 0: a point of these rules that costs nothing
_TWO_POINTS = (((6 - _RADAU) / 10, (16 + _RADAU) / 36), ((6 + _RADAU) / 10, (16 - _RADAU) / 36))
_POINTS: dict[str, tuple[tuple[float, float], ...]] = {
    "fast": ((2 / 3, 3 / 4),),  # Radau: exact for slopes of second degree
    "accurate": ((0.5 - _LOBATTO, 5 / 12), (0.5 + _LOBATTO, 5 / 12), (1.0, 1 / 12)),  # Lobatto: of fifth degree
}


def forecast(
    model: nn.Module,
    batches: Sequence[Batch],
    loss_fn: LossFn,
    sites: SiteTable,
    candidates: Candidates,
    *,
    mode: Mode = "fast",
    after: After = "quantizing",
    statistics: Sequence[Batch] | None = None,
    batch_size_fn: BatchSizeFn = batch_images,
    progress: bool = False,
) -> Forecast:
    """Forecast the distance of any plan to the float network: about a training step a batch, width and point.

    Args:
        model: float, or with quantizers off; left as it was.
        batches: of some hundred samples; their labels do not matter.
        loss_fn: runs the model on a batch; tells which outputs count, see :class:`FloatDistance`.
        sites: table of the model.
        candidates: from :func:`hawq_lightning.candidates`; traces are not needed for them.
        mode: ``fast``: one point of the path, and a forward pass at its end; ``accurate``: three, the end among them.
        after: ``quantizing``, or ``batchnorm``: with the statistics of each batch in the place of the running ones, and
            what those of ``statistics`` change in the float network added.
        statistics: batches by which BatchNorm will be measured again; ``None``: ``batches``.
        batch_size_fn: number of samples in a batch.
        progress: show a bar.

    Raises:
        HawqError: an unknown mode, no candidates, or outputs that cannot be compared.
    """
    choice("mode", mode, get_args(Mode))
    choice("after", after, get_args(After))
    if not candidates:
        raise HawqError("There are no candidates to forecast.")
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    moved = on_device(batches, device)  # once: a DataLoader that shuffles gives others every time
    target = FloatDistance(model, moved, loss_fn, by_batch=_BY_BATCH[after])
    widths = sorted({c.bits for listed in candidates.values() for c in listed})
    shares: dict[str, dict[int, float]] = {name: {} for name in candidates}
    taken: dict[int, dict[str, int]] = {}
    measured: dict[int, float] = {}
    tangent: Tangent | None = None
    samples = moved.samples(batch_size_fn)
    done = itertools.count(1)
    steps = len(widths) * len(moved) * len(_POINTS[mode])
    with pages_kept(), progress_bar("Forecast", steps, progress) as advance:
        for bits in widths:
            path = Path(model, sites, candidates, dict.fromkeys(candidates, bits), nearest=False)
            # networks whose BatchNorm is measured again still work, and shares rank them better than a tangent does
            near = bits == widths[0] and not _BY_BATCH[after]
            every = path.every_width(max(t for t, _ in _POINTS[mode] if t < 1)) if near else None
            total, end = path.shares(_POINTS[mode], target, moved, samples, lambda: advance(next(done)), every)
            measured[bits] = path.distance(target, moved, samples) if math.isnan(end) else end
            tangent = every.tangent(measured[bits]) if every is not None else tangent
            taken[bits] = {name: c.bits for name, c in path.chosen.items()}
            for name, value in total.items():
                shares[name][bits] = value
    expected = {bits: math.fsum(shares[n][b] for n, b in of.items()) for bits, of in taken.items()}
    start = 0.0
    if _BY_BATCH[after]:
        start = distance_of_new_statistics(model, moved, loss_fn, samples, statistics)
    return Forecast(shares, expected, measured, mode, after, start, tangent)


def shares_of_plan(
    model: nn.Module,
    batches: Sequence[Batch],
    loss_fn: LossFn,
    sites: SiteTable,
    candidates: Candidates,
    bits: Mapping[str, int],
    *,
    after: After = "quantizing",
    batch_size_fn: BatchSizeFn = batch_images,
) -> dict[str, float]:
    """What each site adds to the distance of one plan: path attribution on the way to that plan, by two Gauss points.

    Their sum is the distance of the plan.

    Args:
        model: float, or with quantizers off; left as it was.
        batches: of some hundred samples; their labels do not matter.
        loss_fn: runs the model on a batch.
        sites: table of the model.
        candidates: from :func:`hawq_lightning.candidates`.
        bits: site -> bits, of every site with candidates; the nearest of these is taken.
        after: ``quantizing``, or ``batchnorm``.
        batch_size_fn: number of samples in a batch.

    Raises:
        HawqError: a site without bits, or outputs that cannot be compared.
    """
    choice("after", after, get_args(After))
    if missing := [n for n in candidates if n not in bits]:
        raise HawqError(f"The plan says nothing of site {missing[0]!r}.{nearest(missing[0], bits)}")
    moved = on_device(batches, next((p.device for p in model.parameters()), torch.device("cpu")))
    target = FloatDistance(model, moved, loss_fn, by_batch=_BY_BATCH[after])
    samples = moved.samples(batch_size_fn)
    path = Path(model, sites, candidates, bits)
    return path.shares(_TWO_POINTS, target, moved, samples)[0]
