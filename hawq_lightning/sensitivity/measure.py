"""Measure every site's trace on given batches, until the standard errors are small enough."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hawq_lightning.errors import HawqError, nearest
from hawq_lightning.progress import Bar, progress_bar
from hawq_lightning.sensitivity.forward import LossFn, Setting, check_loss, check_weights
from hawq_lightning.sensitivity.ggn import independent_images, probe_batch
from hawq_lightning.sensitivity.hutchinson import hutchinson_batch
from hawq_lightning.sensitivity.slopes import gaussian, rademacher
from hawq_lightning.sensitivity.quiet import quiet, to_device
from hawq_lightning.sensitivity.result import Sensitivity
from hawq_lightning.sensitivity.rows import AllSum, Rows
from hawq_lightning.sites import Patterns, SiteTable, batch_images, find_sites, quantizable_layers

ESTIMATORS = ("ggn", "hutchinson", "exact")
_PER_ROUND = 2
_MIN_FREEDOM = 20  # below it a standard error is itself a guess
_SAFETY = 1.15  # stopping at the first small error picks lucky ones


@dataclass(frozen=True)
class Share:
    """One process's part of a measurement: every ``world``-th batch from ``rank`` on, tables added by ``all_sum``."""

    rank: int = 0
    world: int = 1
    all_sum: AllSum | None = None


def measure(
    model: nn.Module,
    batches: Iterable[Any],
    loss_fn: LossFn,
    *,
    sites: SiteTable | None = None,
    include: Patterns = None,
    exclude: Patterns = None,
    estimator: str = "ggn",
    rtol: float = 0.05,
    max_probes: int = 200,
    distribution: str = "rademacher",
    rotate: bool = True,
    seed: int = 0,
    progress: bool | Bar = True,
    images_of: Callable[[Any], int] = batch_images,
    share: Share | None = None,
    reuse: Callable[[str], Sensitivity | None] | None = None,
) -> Sensitivity:
    """Average Hessian traces of every weight and activation (paper 2.1, 2.2), with standard errors.

    Plain PyTorch: the model is left exactly as it was (modes, buffers, gradients, random states).

    Args:
        model: any module; dropout is off and BatchNorm uses running statistics while measuring.
        batches: any iterable of batches, all kept in memory; each is a unit of the loss and is never split.
        loss_fn: ``loss_fn(model, batch) -> scalar``, a mean over images or any other reduction.
        sites: what to measure; found by a forward pass of the first batch when not given.
        include: glob on layer names, layer type, or ``f(name, module) -> bool``; see :func:`hawq_lightning.sites`.
        exclude: likewise.
        estimator: ``ggn``, output-space Gauss-Newton probes; ``exact``, all columns of the output instead of random
            probes; ``hutchinson``, the paper's, on the true Hessian.
        rtol: stop when every site's standard error is below this share of its trace.
        max_probes: random vectors a batch at the most.
        distribution: of Hutchinson's vectors, ``rademacher`` or ``gaussian``.
        rotate: rotate the signs onto the softmax factor's singular vectors: unbiased, less noise.
        seed: of all random draws; the result does not depend on the number of processes.
        progress: show a bar.
        images_of: number of images in a batch.
        share: for several processes, see :class:`Share`.
        reuse: fingerprint -> an earlier measurement of the same weights, data and settings, or ``None``.

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
    if not 0 < rtol < 10:
        raise HawqError(f"rtol is {rtol!r}; it is a share of the trace, for example 0.05.")
    began = time.perf_counter()
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    kept = [to_device(b, device) for b in batches]
    if not kept:
        raise HawqError("No batches to measure on: the dataloader or iterable is empty.")
    images = [images_of(b) for b in kept]
    share = share or Share()
    with quiet(model, seed):
        layers, _ = quantizable_layers(model, include, exclude)
        check_weights(layers)
        table = sites or find_sites(model, lambda: loss_fn(model, kept[0]), images[0], include, exclude)
        layers = {x.name: layers[x.name] for x in table.layers}
        setting = Setting(model, layers, table, loss_fn)
        key = fingerprint(setting, kept, f"{estimator} {rtol} {distribution}", seed, images)
        known = reuse(key) if reuse is not None else None
        if known is not None:
            return known
        per_image = independent_images(setting, kept[0], images[0])
        if estimator == "hutchinson":
            per_image = {s.name: per_image[s.name] and s.kind == "activation" for s in table}
        rows = Rows(table, images, per_image)
        final = _probe(
            setting, kept, images, rows, share, estimator, rtol, max_probes, distribution, rotate, seed, progress
        )
    records = final.records(exact=estimator == "exact")
    _check_curvature(setting, records)
    settings = {
        "estimator": estimator, "rtol": rtol, "seed": seed, "images": sum(images), "batches": len(kept),
        "probes": final.probes, "distribution": distribution, "seconds": round(time.perf_counter() - began, 3),
        "processes": share.world,
    } | setting.facts  # fmt: skip
    return Sensitivity(
        records=records,
        rows={n: final.means(n).tolist() for n in final.mean},
        sizes={n: t.tolist() for n, t in final.size.items()},
        row_weights={n: t.tolist() for n, t in final.weight.items() if not per_image[n]},
        row_unit={n: "image" if per else "batch" for n, per in per_image.items()},
        settings=settings,
        notes=tuple(setting.notes),
        fingerprint=key,
    )


def _probe(
    setting: Setting, kept: Sequence[Any], images: Sequence[int], rows: Rows, share: Share, estimator: str,
    rtol: float, max_probes: int, distribution: str, rotate: bool, seed: int, progress: bool | Bar,
) -> Rows:  # fmt: skip
    """Rounds of probes over all batches, until the errors are small."""
    mine = range(share.rank, len(kept), share.world)
    sample_of = rademacher if distribution == "rademacher" else gaussian
    bar = nullcontext(progress) if isinstance(progress, Bar) else progress_bar(progress and share.rank == 0)
    with bar as shown:
        task = shown.begin("Hessian traces", len(mine))
        turn = 0
        while True:
            for done, b in enumerate(mine):
                generator = torch.Generator().manual_seed(_mix(seed, b, turn))
                add = lambda values, b=b: rows.add(b, values)  # noqa: E731
                if estimator == "hutchinson":
                    sizes = hutchinson_batch(
                        setting, kept[b], images[b], rows.per_image, sample_of(generator), _PER_ROUND, add
                    )
                else:
                    sizes = probe_batch(
                        setting, kept[b], images[b], rows.per_image, generator, _PER_ROUND, add,
                        rotate=rotate, exact=estimator == "exact",
                    )  # fmt: skip
                for site, size in sizes.items():
                    rows.size[site][rows.place(site, b)] = size
                shown.advance(task, done + 1)
            turn += 1
            rows.probes = 1 if estimator == "exact" else _PER_ROUND * turn
            final = rows.gathered(share.all_sum)
            if estimator == "exact":
                return final
            worst, name = _worst(final)
            if worst <= rtol / _SAFETY and min(final.freedom(s.name) for s in setting.table) >= _MIN_FREEDOM:
                return final
            if rows.probes + _PER_ROUND > max_probes:
                setting.note(f"Stopped at {rows.probes} probes a batch with a standard error of {worst:.1%} at {name}.")
                return final
            task = shown.begin(f"Hessian traces, error {worst:.1%} at {name}", len(mine))


def _worst(rows: Rows) -> tuple[float, str]:
    """The largest standard error as a share of its trace; sites without curvature have none."""
    worst, name = 0.0, ""
    for s in rows.table:
        error, trace = rows.stderr(s.name), abs(rows.trace(s.name))
        if error > 0 and error > worst * trace:
            worst, name = (error / trace if trace > 0 else math.inf), s.name
    return worst, name


def _check_curvature(setting: Setting, records: Sequence[Any]) -> None:
    flat = [r.name for r in records if r.trace == 0]
    if len(flat) == len(records):
        raise HawqError(
            "The loss has no curvature in any layer's output: it is linear there (an L1 loss?), forbids a second "
            "derivative, or does not depend on the layers."
        )
    if flat:
        shown = ", ".join(flat[:3]) + (f" and {len(flat) - 3} more" if len(flat) > 3 else "")
        setting.note(f"The loss has zero curvature at {shown}.")


def fingerprint(setting: Setting, batches: Sequence[Any], estimator: str, seed: int, images: Sequence[int]) -> str:
    """Hash of the weights, of the drawn input tensors, of the first batch's loss and of the settings."""
    digest = hashlib.sha256(f"{estimator} {seed} {list(images)}".encode())
    for name, value in setting.model.state_dict().items():
        digest.update(name.encode())
        if isinstance(value, torch.Tensor):
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    for batch in batches:
        _hash_tensors(batch, digest)
    with torch.enable_grad():
        loss = check_loss_value(setting, batches[0])
    setting.facts["loss"] = loss
    digest.update(f"{loss:.6g}".encode())
    return f"sha256:{digest.hexdigest()}"


def check_loss_value(setting: Setting, batch: Any) -> float:
    """The loss of a batch as a number, checked."""
    weights = [m.weight for m in setting.layers.values()]
    for w in weights:
        w.requires_grad_(True)
    try:
        return float(check_loss(setting.loss_fn(setting.model, batch)).detach())
    finally:
        for w in weights:
            w.requires_grad_(False)


def _hash_tensors(batch: Any, digest: Any) -> None:
    if isinstance(batch, torch.Tensor):
        digest.update(batch.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    elif isinstance(batch, Mapping):
        for value in batch.values():
            _hash_tensors(value, digest)
    elif isinstance(batch, (list, tuple)):
        for value in batch:
            _hash_tensors(value, digest)


def _mix(*numbers: int) -> int:
    """One 63-bit seed from several numbers."""
    return int.from_bytes(hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest(), "little") >> 1
