"""Is the network piecewise linear in every site alone? Then Gauss-Newton traces are exact; tried, never assumed.

The loss is replaced by a random linear function of the network's outputs. Its second derivative at a site vanishes
exactly where the network is piecewise linear there: SiLU, sigmoid gates, LayerNorm, attention and weights that are used
in series show up, however they are written.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from hawq_lightning._errors import HawqError
from hawq_lightning.sensitivity._context import ForwardPass, MeasureContext
from hawq_lightning.sensitivity._double_backward import GradGraph, gaussian, rademacher, slopes_of
from hawq_lightning.sensitivity._ggn import RademacherProbes, probe_batch
from hawq_lightning.sensitivity._hutchinson import hutchinson_batch
from hawq_lightning.sensitivity._microbatch import ImagesOf, take

_VANISHES = 1e-6  # relative; piecewise linear networks give exact zeros
_FEW = 4  # images for the check
_SOME = 4  # images and probes to weigh the missing part by
_AFFORDABLE = 24  # sites to differentiate twice one by one
_MATTERS = 0.1  # of the Gauss-Newton trace


@dataclass(frozen=True)
class Linearity:
    """What the check found.

    Attributes:
        curved: sites at which the network is not piecewise linear.
        failed: why it could not tell, otherwise empty.
    """

    curved: tuple[str, ...] = ()
    failed: str = ""


def check_linearity(
    setting: MeasureContext,
    batch: Any,
    images: int,
    per_image: Mapping[str, bool],
    batch_size_fn: ImagesOf,
    seed: int = 0,
    most: int | None = None,
) -> Linearity:
    """One double backward on a few images; one a site more only if that does not vanish.

    With ``most`` no more than so many sites, spread evenly, are looked at one by one.

    All activations are disturbed at once, weights held: of a piecewise linear network even that has no second
    derivative. A weight that is used in series is looked at alone.
    """
    batch, images = _few(setting, batch, images, per_image, batch_size_fn, _FEW)
    generator = torch.Generator().manual_seed(seed)
    sample = gaussian(generator)

    # the direction requires gradients so that kernels without a second derivative say so, instead of seeming constant
    directions: list[torch.Tensor] = []

    def random(step: ForwardPass) -> list[torch.Tensor]:
        directions[:] = [sample(v).requires_grad_(True) for v in step.hessian.values]
        return directions

    try:
        with slopes_of(setting, batch, per_image, random, weights=False) as slopes:
            serial = _in_series(slopes)
            smooth = not _has_second_derivative(slopes, list(slopes.points), sample, directions)
        if smooth and not serial:
            return Linearity()
        every = [s.name for s in setting.table]
        sites = serial if smooth else every[:: max(1, -(-len(every) // most)) if most else 1]
        with slopes_of(setting, batch, per_image, random, sites=sites) as slopes:
            return Linearity(tuple(s.name for s in setting.table if s.name in slopes.points
                                   and _has_second_derivative(slopes, [s.name], sample, directions)))  # fmt: skip
    except (RuntimeError, NotImplementedError) as error:
        return Linearity(failed=str(error).strip().split("\n")[0].rstrip("."))


def choose_estimator(
    setting: MeasureContext,
    batch: Any,
    images: int,
    per_image: Mapping[str, bool],
    batch_size_fn: ImagesOf,
    seed: int = 0,
) -> tuple[str, tuple[str, ...]]:
    """The rule behind ``estimator='auto'``; what it found and chose goes into the notes.

    Piecewise linear: ``ggn``, which is then exact. Otherwise the missing part is estimated on a few images: where it is
    below a tenth of every trace, or cannot be told from zero, ``ggn`` again, which is cheap and never negative; where
    it is more, ``hessian``, unless that would take a double backward at more than 24 sites for every probe. Without
    double backward through the network: ``ggn``.

    Returns:
        the estimator, and the sites at which the network is not piecewise linear.
    """
    found = check_linearity(setting, batch, images, per_image, batch_size_fn, seed, _AFFORDABLE)
    if found.failed:
        setting.note(
            f"estimator='auto' could not check whether the network is piecewise linear ({found.failed}); it took "
            "'ggn', whose traces are then Gauss-Newton approximations."
        )
        return "ggn", ()
    if not found.curved:
        return "ggn", ()
    where = f"The network is not piecewise linear at {named(setting, found.curved)}"
    try:
        share, site = _missing(setting, batch, images, per_image, batch_size_fn, found.curved, seed)
    except (RuntimeError, HawqError):
        share, site = 0.0, ""
    part = f"about {share:.0%} of" if share < 1 else "as much as"
    if share > _MATTERS and len(setting.table) > _AFFORDABLE:
        setting.note(
            f"{where}, and Gauss-Newton misses {part} the trace at {site}. estimator='auto' took 'ggn' all the same, "
            f"since the true Hessian takes a double backward at each of {len(setting.table)} sites for every probe; "
            "estimator='hessian' asks for it."
        )
        return "ggn", found.curved
    if share > _MATTERS:
        setting.note(
            f"{where}, and Gauss-Newton misses {part} the trace at {site}: estimator='auto' took "
            "'hessian', the true trace at the cost of double backward. It can be negative; bits are then chosen by its "
            "upper bound. estimator='ggn' is faster and never negative."
        )
        return "hessian", found.curved
    setting.note(
        f"{where}, but Gauss-Newton misses no more than {_MATTERS:.0%} of any trace on the images that were tried: "
        "estimator='auto' took 'ggn'. estimator='hessian' gives the true trace."
    )
    return "ggn", found.curved


def named(setting: MeasureContext, sites: tuple[str, ...], most: int = 4) -> str:
    """The layers of some sites, the first few of them."""
    known = set(sites)
    layers = [x.name for x in setting.table.layers if x.weight in known or x.activation in known]
    return ", ".join(layers[:most]) + (f" and {len(layers) - most} more layers" if len(layers) > most else "")


def _few(
    setting: MeasureContext, batch: Any, images: int, per_image: Mapping[str, bool], batch_size_fn: ImagesOf, most: int
) -> tuple[Any, int]:
    """The first images of the batch, if the loss takes them."""
    if images > most and all(per_image.values()):
        part = take(batch, images, 0, most, batch_size_fn)
        if part is not None:
            try:
                with torch.no_grad():
                    float(setting.loss_fn(setting.model, part))
                return part, most
            except Exception:  # somebody's loss: whatever it raises, the whole batch is what it was made for
                return batch, images
    return batch, images


def _has_second_derivative(slopes: GradGraph, sites: list[str], sample: Any, directions: list[torch.Tensor]) -> bool:
    """Whether the gradients at ``sites`` change when all of these are disturbed."""
    pairs = [
        (p, g, sample(p) * _size(p))
        for s in sites
        for p, g in zip(slopes.points[s], slopes.gradient[s])
        if g is not None and g.requires_grad
    ]
    if not pairs:
        return False
    if once := _once_only([g for _, g, _ in pairs]):
        raise NotImplementedError(f"an operation has no second derivative ({once})")
    points = [p for p, _, _ in pairs]
    found = torch.autograd.grad(
        [g for _, g, _ in pairs], [*points, *directions], [v for _, _, v in pairs], retain_graph=True, allow_unused=True
    )
    # of the size of what is disturbed, so that the slopes change by a share that means something
    return any(
        h is not None and float(h.norm()) > _VANISHES * float(g.detach().norm())
        for h, (_, g, _) in zip(found[: len(points)], pairs)
    )


def _size(point: torch.Tensor) -> float:
    return float(point.detach().square().mean().sqrt()) or 1.0


def _in_series(slopes: GradGraph) -> list[str]:
    """Weights with a call that reads what an earlier call of theirs made."""
    out = []
    for site, outputs in slopes.step.network.output_nodes().items():
        nodes = set(outputs)
        if len(nodes) > 1 and any(_reaches(start, nodes - {start}) for start in nodes):
            out.append(site)
    return out


def _once_only(slopes: list[torch.Tensor]) -> str:
    """The name of a node that stands for a missing second derivative, or nothing."""
    stack = [g.grad_fn for g in slopes if g.grad_fn is not None]
    seen = set(stack)
    while stack:
        node = stack.pop()
        if node.name().rpartition("::")[2] in ("Error", "NotImplemented"):
            return "once_differentiable" if node.name().endswith("Error") else "not implemented"
        new = {p for p, _ in node.next_functions if p is not None} - seen
        seen |= new
        stack += new
    return ""


def _reaches(start: Any, goals: set[Any]) -> bool:
    stack, seen = [start], {start}
    while stack:
        for parent, _ in stack.pop().next_functions:
            if parent in goals:
                return True
            if parent is not None and parent not in seen:
                seen.add(parent)
                stack.append(parent)
    return False


def _missing(
    setting: MeasureContext,
    batch: Any,
    images: int,
    per_image: Mapping[str, bool],
    batch_size_fn: ImagesOf,
    curved: tuple[str, ...],
    seed: int,
) -> tuple[float, str]:
    """The largest share of a trace that Gauss-Newton misses, less two standard errors; and its site."""
    batch, images = _few(setting, batch, images, per_image, batch_size_fn, _SOME)
    generator = torch.Generator().manual_seed(seed + 1)
    missing: list[dict[str, torch.Tensor]] = []
    known = probe_batch(setting, batch, images, per_image, RademacherProbes([(images, seed)]), _SOME).rows
    weights = {s.name for s in setting.table.weights}
    own = {n: per and n not in weights for n, per in per_image.items()}
    hutchinson_batch(
        setting, batch, images, own, rademacher(generator), _SOME, missing.append, linearised=True, only=curved
    )
    worst, at = 0.0, ""
    for site in curved:
        trace = sum(float(rows[site].sum()) for rows in known if site in rows) / _SOME
        values = torch.tensor([float(rows[site].sum()) for rows in missing], dtype=torch.float64)
        sure = abs(float(values.mean())) - 2 * float(values.std()) / _SOME**0.5
        if trace > 0 and sure / trace > worst:
            worst, at = sure / trace, site
    return worst, at
