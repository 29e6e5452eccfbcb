"""Is the network piecewise linear in every site alone? Then Gauss-Newton traces are exact; tried, never assumed.

The loss is replaced by a random linear function of the network's outputs. Its second derivative at a site vanishes
exactly where the network is piecewise linear there: SiLU, sigmoid gates, LayerNorm, attention and weights that are used
in series show up, however they are written.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch.autograd.graph import Node

from hawq_lightning._errors import some
from hawq_lightning._loss_graph import walk
from hawq_lightning.layers import WeightReader, as_reader
from hawq_lightning.sensitivity._context import ForwardPass, MeasureContext
from hawq_lightning.sensitivity._double_backward import GradGraph, Sampler, gaussian, gradients_of
from hawq_lightning.sensitivity._estimator import Pilot
from hawq_lightning.sensitivity._grad_capture import with_copies

_VANISHES = 1e-6  # relative, less in float64; piecewise linear networks give exact zeros
_ROUNDINGS = 8
_FEW = 4  # samples for the check


@dataclass(frozen=True)
class Linearity:
    """What the check says.

    Attributes:
        nonlinear_sites: sites at which the network is not piecewise linear.
        failed: why it could not tell, otherwise empty.
    """

    nonlinear_sites: tuple[str, ...] = ()
    failed: str = ""


def check_linearity(context: MeasureContext, pilot: Pilot, seed: int = 0, most: int | None = None) -> Linearity:
    """One double backward on a few samples; one a site more only if that does not vanish.

    All activations are disturbed at once, weights held (but for those of look-ups, which read no activation): of a
    piecewise linear network even that has no second derivative. A weight that is used in series is looked at alone.

    Args:
        context: model, loss and sites.
        pilot: samples to try it on.
        seed: of the random function and disturbances.
        most: look no further once so many sites are found, activations first: in a network that is not piecewise
            linear the first one mostly is such a site. ``None``: look at all.
    """
    pilot = pilot.first(context, _FEW)
    return with_copies(context.diagnostics.overwritten, lambda: _check_linearity(context, pilot, seed, most))


def _check_linearity(context: MeasureContext, pilot: Pilot, seed: int, most: int | None) -> Linearity:
    sampler = gaussian(torch.Generator().manual_seed(seed))

    # the direction requires gradients so that kernels without a second derivative say so, instead of seeming constant
    directions: list[torch.Tensor] = []

    def random_direction(forward: ForwardPass) -> list[torch.Tensor]:
        directions[:] = [sampler(v).requires_grad_(True) for v in forward.hessian.values]
        return directions

    inputs = [s.name for s in context.table.activations]
    inputs += [x.weight for x in context.table.layers if _weight_is_tried(as_reader(context.layers[x.name]))]
    # a table of weights alone: they bend together in any network of two layers, so each is then looked at alone
    inputs = inputs or [s.name for s in context.table]
    try:
        with gradients_of(context, pilot.batch, pilot.per_sample, random_direction, sites=inputs) as gradients:
            serial = _in_series(gradients)
            # two factors of a product bend together, and may not bend alone
            together = _second_derivatives(gradients, list(gradients.points), sampler, directions)
            names = [s.name for s in context.table if s.name in together] if most else []
            nonlinear = _alone(gradients, names, sampler, directions, most)
        sites = [s.name for s in context.table] if together and most is None else serial
        if sites and (most is None or len(nonlinear) < most):
            with gradients_of(context, pilot.batch, pilot.per_sample, random_direction, sites=sites) as gradients:
                names = [s.name for s in context.table if s.name in gradients.points]
                nonlinear += _alone(gradients, names, sampler, directions, most)
        return Linearity(tuple(nonlinear))
    except (RuntimeError, NotImplementedError) as error:
        return Linearity(failed=str(error).strip().split("\n")[0].rstrip("."))


def _weight_is_tried(reader: WeightReader) -> bool:
    """Where no activation is disturbed; torch differentiates convolutions twice by their weight a group at a time."""
    return not reader.read.reads_activation and int(getattr(reader.module, "groups", 1)) == 1


def layer_names(context: MeasureContext, sites: Collection[str], most: int = 4) -> str:
    """The layers of some sites, for a sentence; the first ``most`` of them by name."""
    layers = [x.name for x in context.table.layers if x.weight in sites or x.activation in sites]
    layers += [n for s in context.table.activations if s.name in sites for n in s.layers if n in context.operands]
    return some(layers, most, "layers")


def _alone(
    gradients: GradGraph, names: Sequence[str], sampler: Sampler, directions: Sequence[torch.Tensor], most: int | None
) -> list[str]:
    """The first ``most`` of some sites whose gradients change when they alone are disturbed."""
    found: list[str] = []
    for name in names:
        if len(found) == most:
            break
        found += _second_derivatives(gradients, [name], sampler, directions)
    return found


def _second_derivatives(
    gradients: GradGraph, sites: Sequence[str], sampler: Sampler, directions: Sequence[torch.Tensor]
) -> set[str]:
    """Those of ``sites`` whose gradients change when all of these are disturbed."""
    parts = [
        (s, p, g, sampler(p) * _size(p))
        for s in sites
        for p, g in zip(gradients.points[s], gradients.gradient[s])
        if g is not None and g.requires_grad
    ]
    if not parts:
        return set()
    if once := _once_only([g for _, _, g, _ in parts]):
        raise NotImplementedError(f"an operation has no second derivative ({once})")
    points = [p for _, p, _, _ in parts]
    changes = torch.autograd.grad(
        [g for _, _, g, _ in parts], [*points, *directions], [v for _, _, _, v in parts],
        retain_graph=True, allow_unused=True,
    )  # fmt: skip
    # of the size of what is disturbed, so that the gradients change by a share that means something
    return {
        s
        for h, (s, _, g, _) in zip(changes, parts)
        if h is not None and float(h.norm()) > _vanishes(h) * float(g.detach().norm())
    }


def _vanishes(x: torch.Tensor) -> float:
    return min(_VANISHES, _ROUNDINGS * torch.finfo(x.dtype).eps)


def _size(point: torch.Tensor) -> float:
    """Root mean square, to disturb by; 1 of a tensor of zeros."""
    return float(point.detach().square().mean().sqrt()) or 1.0


def _in_series(gradients: GradGraph) -> list[str]:
    """Weights with a call that reads what an earlier call of theirs made."""
    out = []
    for site, outputs in gradients.forward.network.output_nodes().items():
        nodes = set(outputs)
        if len(nodes) > 1 and any(_reaches(start, nodes - {start}) for start in nodes):
            out.append(site)
    return out


def _once_only(gradients: list[torch.Tensor]) -> str:
    """The name of a node that stands for a missing second derivative, or nothing."""
    for node in walk(g.grad_fn for g in gradients):
        if node.name().rpartition("::")[2] in ("Error", "NotImplemented"):
            return "once_differentiable" if node.name().endswith("Error") else "not implemented"
    return ""


def _reaches(start: Node, goals: set[Node]) -> bool:
    """Whether the graph behind ``start`` holds one of ``goals``."""
    return any(node in goals for node in walk([start]))
