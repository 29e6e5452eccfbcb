"""Measure every site's trace on given batches, until the standard errors are small enough."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hawq_lightning._batches import batch_images
from hawq_lightning._errors import HawqError, nearest
from hawq_lightning._progress import Bar
from hawq_lightning._site_table import SiteTable
from hawq_lightning._sites import Patterns, find_sites, quantizable_layers
from hawq_lightning.sensitivity._auto import check_linearity, choose_estimator, named
from hawq_lightning.sensitivity._checkpoint import MeasurementCheckpoint
from hawq_lightning.sensitivity._context import LossFn, MeasureContext, check_weights
from hawq_lightning.sensitivity._fingerprint import fingerprint
from hawq_lightning.sensitivity._ggn import independent_images
from hawq_lightning.sensitivity._isolate import isolated_eval, to_device
from hawq_lightning.sensitivity._microbatch import ImagesOf, out_of_memory, take
from hawq_lightning.sensitivity._precision import check_precision, settle_precision
from hawq_lightning.sensitivity._probe_runner import ProbeRunner
from hawq_lightning.sensitivity._result import Sensitivity, SiteTrace
from hawq_lightning.sensitivity._sampling import check_draw
from hawq_lightning.sensitivity._statistics import TraceStatistics
from hawq_lightning.sensitivity._trace_loop import ProcessShard, TraceLoop

__all__ = ["ESTIMATORS", "L1", "ProcessShard", "measure"]

ESTIMATORS = ("auto", "ggn", "hessian", "hutchinson", "exact")
L1 = ("zero", "fisher")
_FEW = 16  # images that tell whether rows are images


def measure(
    model: nn.Module,
    batches: Iterable[Any],
    loss_fn: LossFn,
    *,
    sites: SiteTable | None = None,
    include: Patterns = None,
    exclude: Patterns = None,
    estimator: str = "auto",
    rtol: float = 0.05,
    max_probes: int = 200,
    distribution: str = "rademacher",
    rotate: bool = True,
    draw: str = "auto",
    l1: str = "zero",
    precision: str = "float32",
    seed: int = 0,
    progress: bool | Bar = True,
    batch_size_fn: ImagesOf = batch_images,
    share: ProcessShard | None = None,
    reuse: Callable[[str], Sensitivity | None] | None = None,
    resume: str | Path | Callable[[str], str | Path | None] | None = None,
    enough: Callable[[Sensitivity], bool] | None = None,
) -> Sensitivity:
    """Average Hessian traces of every weight and activation (paper 2.1, 2.2), with standard errors.

    Plain PyTorch: the model is left exactly as it was (modes, buffers, gradients, random states).

    Args:
        model: any module; dropout is off and BatchNorm uses running statistics while measuring.
        batches: any iterable of batches, all kept in memory; each is a unit of the loss. Where memory runs out they are
            taken in parts, if the loss is a mean or sum over images that does not couple them.
        loss_fn: ``loss_fn(model, batch) -> scalar``, a mean over images or any other reduction.
        sites: what to measure; found by a forward pass of the first batch when not given.
        include: glob on layer names, layer type, or ``f(name, module) -> bool``; see :func:`hawq_lightning.sites`.
        exclude: likewise.
        estimator: ``ggn``, output-space Gauss-Newton probes, exact in the mean for piecewise linear networks and never
            negative for convex losses; ``hessian``, with what they miss of other networks added by Hutchinson's method
            on the linearised loss; ``auto``, one of these two by a check on a few images (it is told in ``notes``:
            ``hessian`` only where Gauss-Newton misses more than a tenth of some trace and there are no more than 24
            sites); ``exact``, all columns of the
            output instead of random probes; ``hutchinson``, the paper's, on the true Hessian.
        rtol: stop when every site's standard error is below this share of its trace.
        max_probes: random vectors a batch at the most.
        distribution: of Hutchinson's vectors, ``rademacher`` or ``gaussian``.
        rotate: rotate the signs onto the softmax factor's singular vectors: unbiased, less noise.
        draw: which images a round of probes sends back: ``all`` of them; those that a draw in proportion to the
            ``curvature`` of the loss at their outputs picks, weighed so that the mean is the same; ``auto``, drawn ones
            where that is possible and promises to save a third of the work, as in trained networks.
        l1: output tensors whose loss has slope but no curvature, as L1 box losses have: ``zero``, the Hessian as it is;
            ``fisher``, the Fisher information of a Laplace distribution of unit scale in its place.
        precision: of forward and backward passes; ``bf16``, autocast to bfloat16, is used only for Gauss-Newton probes
            and if one of them agrees with float32 within 5% at every site.
        seed: of all random draws; the result does not depend on the number of processes.
        progress: show a bar.
        batch_size_fn: number of images in a batch.
        share: for several processes, see :class:`ProcessShard`.
        reuse: fingerprint -> an earlier measurement of the same weights, data and settings, or ``None``.
        resume: file to keep unfinished rows in, or a function from the fingerprint to it; an interrupted call with the
            same arguments goes on from there.
        enough: asked now and then with what is known by then: whether that will do, however large the errors; such as
            :class:`hawq_lightning.selection.StablePlan`. Its ``key``, if it has one, goes into the fingerprint.

    Returns:
        one record a site; traces are of the loss as given, averaged over batches in proportion to their images.

    Raises:
        HawqError: no batches, no quantizable layer, a loss that is no finite scalar or does not depend on the model,
            weights that hold NaN, no curvature anywhere, unknown estimator or pattern.
    """
    if estimator not in ESTIMATORS:
        raise HawqError(
            f"Unknown estimator {estimator!r}; use one of {', '.join(ESTIMATORS)}.{nearest(estimator, ESTIMATORS)}"
        )
    if distribution not in ("rademacher", "gaussian"):
        raise HawqError(f"Unknown distribution {distribution!r}; use 'rademacher' or 'gaussian'.")
    check_draw(draw)
    if l1 not in L1:
        raise HawqError(f"Unknown l1 {l1!r}; use 'zero' or 'fisher'.{nearest(str(l1), L1)}")
    check_precision(precision)
    if not 0 < rtol < 10:
        raise HawqError(f"rtol is {rtol!r}; it is a share of the trace, for example 0.05.")
    began = time.perf_counter()
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    kept = [to_device(b, device) for b in batches]
    if not kept:
        raise HawqError("No batches to measure on: the dataloader or iterable is empty.")
    images = [batch_size_fn(b) for b in kept]
    with isolated_eval(model, seed):
        layers, _ = quantizable_layers(model, include, exclude)
        check_weights(layers)
        first, few = kept[0], images[0]
        while True:
            try:
                table = sites or find_sites(model, lambda x=first: loss_fn(model, x), few, include, exclude)  # type: ignore[misc]
                setting = MeasureContext(model, {x.name: layers[x.name] for x in table.layers}, table, loss_fn, l1=l1)
                asked = (
                    f"{estimator} {rtol} {max_probes} {distribution} {rotate} {draw} {l1} {getattr(enough, 'key', '')}"
                ) + (f" {precision}" if precision != "float32" else "")
                key = fingerprint(setting, kept, first, asked, seed, images)
                known = reuse(key) if reuse is not None else None
                if known is not None:
                    return known
                per_image = _independent(setting, first, few, batch_size_fn)
                break
            except Exception as error:
                half = take(kept[0], images[0], 0, few // 2, batch_size_fn) if out_of_memory(error) else None
                if half is None:
                    raise
                first, few = half, few // 2
        chosen, curved = _estimator(estimator, setting, first, few, per_image, batch_size_fn, seed)
        if chosen == "ggn":
            setting.precision = precision
            settle_precision(setting, first, few, per_image, seed)
        elif precision != "float32":
            setting.note(f"precision='{precision}' is for Gauss-Newton probes; float32 was used.")
        probes = ProbeRunner(
            setting,
            chosen,
            per_image,
            batch_size_fn,
            distribution,
            rotate,
            curved,
            seed,
            None if few == images[0] else few,
        )
        rounds = TraceLoop(
            probes, draw,
            None if enough is None else lambda rows: enough(_result(rows, unit, rows.records(), {}, (), key)),
        )  # fmt: skip
        if probes.largest is not None:
            probes.settle(kept[0], images[0], few)
        share = share or ProcessShard()
        partial = MeasurementCheckpoint(
            resume(key) if callable(resume) else resume, key, share.rank, setting.facts, setting.notes
        )
        unit = probes.row_unit()
        final = rounds.until(
            kept, images, TraceStatistics(table, images, unit), share, rtol, max_probes, progress, partial
        )  # fmt: skip
        if reuse is None:  # else whoever looks for earlier results removes it once this one is saved
            partial.finish()
    records = final.records(exact=chosen == "exact")
    _check_curvature(setting, records)
    settings = {
        "estimator": chosen, "estimator_asked": estimator, "l1": l1, "rtol": rtol, "seed": seed,
        "images": sum(images), "batches": len(kept),
        "probes": final.probes, "distribution": distribution, "seconds": round(time.perf_counter() - began, 3),
        "processes": share.world, "draw": "all" if rounds.drawn is None else "curvature", "stopped": rounds.stopped,
        "precision": setting.precision,
    } | setting.facts  # fmt: skip
    if rounds.drawn is not None:
        share_drawn = float(rounds.drawn.design.probability.mean())
        settings |= {"rounds": final.probes, "probes": round(final.probes * share_drawn, 2)}
    return _result(final, unit, records, settings, setting.notes, key)


def _result(
    rows: TraceStatistics,
    unit: dict[str, bool],
    records: Sequence[SiteTrace],
    settings: dict[str, Any],
    notes: Sequence[str],
    key: str,
) -> Sensitivity:
    return Sensitivity(
        records=tuple(records),
        rows={n: rows.means(n).tolist() for n in rows.mean},
        sizes={n: _filled(t).tolist() for n, t in rows.size.items()},
        row_weights={n: t.tolist() for n, t in rows.weight.items() if not unit[n]},
        row_unit={n: "image" if per else "batch" for n, per in unit.items()},
        settings=settings,
        notes=tuple(notes),
        fingerprint=key,
    )


def _independent(setting: MeasureContext, batch: Any, images: int, batch_size_fn: ImagesOf) -> dict[str, bool]:
    """Whether rows are images, site by site; a few images tell as much as the batch."""
    part = take(batch, images, 0, _FEW, batch_size_fn) if images > _FEW else None
    if part is not None:
        try:
            return independent_images(setting, part, _FEW)
        except Exception:  # somebody's loss: whatever it raises, the whole batch is what it was made for
            pass
    return independent_images(setting, batch, images)


def _filled(sizes: torch.Tensor) -> torch.Tensor:
    """Sizes of rows that were never drawn are not known; their traces count 0, whatever stands here."""
    known = sizes > 0
    return torch.where(known, sizes, sizes[known].mean()) if bool(known.any()) else sizes.clamp_min(1)


def _estimator(
    asked: str,
    setting: MeasureContext,
    batch: Any,
    images: int,
    per_image: dict[str, bool],
    batch_size_fn: ImagesOf,
    seed: int,
) -> tuple[str, tuple[str, ...]]:
    """The estimator to use, and the sites where the network is not piecewise linear if that matters to it.

    Raises:
        HawqError: ``hessian`` on a network that cannot be differentiated twice.
    """
    if asked == "auto":
        return choose_estimator(setting, batch, images, per_image, batch_size_fn, seed)
    if asked != "hessian":
        return asked, ()
    found = check_linearity(setting, batch, images, per_image, batch_size_fn, seed)
    if found.failed:
        raise HawqError(f"estimator='hessian' needs double backward through the network: {found.failed}. Use 'ggn'.")
    if not found.curved:
        setting.note("The network is piecewise linear: 'ggn' gives the traces of the true Hessian, and was used.")
        return "ggn", ()
    setting.note(
        f"The network is not piecewise linear at {named(setting, found.curved)}: Gauss-Newton traces were completed "
        "there by the Hessian of the linearised loss. Such traces can be negative."
    )
    return "hessian", found.curved


def _check_curvature(setting: MeasureContext, records: Sequence[Any]) -> None:
    flat = [r.name for r in records if r.trace == 0]
    if len(flat) == len(records):
        raise HawqError(
            "The loss has no curvature in any layer's output: it is linear there (an L1 loss?), forbids a second "
            "derivative, or does not depend on the layers."
        )
    if flat:
        shown = ", ".join(flat[:3]) + (f" and {len(flat) - 3} more" if len(flat) > 3 else "")
        setting.note(f"The loss has zero curvature at {shown}.")
