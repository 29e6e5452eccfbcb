"""The paper's estimator: Hutchinson's method on the true Hessian, one layer at a time (eq. 6-9).

z^T H_l z for random z, the Hessian-vector product by double backward through the network. Kept for networks that are
not piecewise linear and as the check of the Gauss-Newton probes; slow.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from hawq_lightning.sensitivity.forward import Setting, check_loss
from hawq_lightning.sensitivity.network import Network

Sampler = Callable[[torch.Tensor], torch.Tensor]


def rademacher(generator: torch.Generator) -> Sampler:
    """Random signs."""
    return lambda like: torch.randint(0, 2, like.shape, generator=generator).mul_(2).sub_(1).to(like)


def gaussian(generator: torch.Generator) -> Sampler:
    """Standard normal numbers: the paper's other choice, with more variance."""
    return lambda like: torch.randn(like.shape, generator=generator, dtype=torch.float64).to(like)


def hutchinson_batch(
    setting: Setting,
    batch: Any,
    images: int,
    per_image: Mapping[str, bool],
    sample: Sampler,
    steps: int,
    record: Callable[[dict[str, torch.Tensor]], None],
) -> dict[str, torch.Tensor]:
    """Record ``steps`` estimates of every site for one batch.

    Weight rows are batches; activation rows are images where images are independent, since then eq. 9 holds.

    Returns:
        activation site -> elements of each row.
    """
    weights: dict[str, Any] = {x.weight: setting.layers[x.name].weight for x in reversed(setting.table.layers)}
    for w in weights.values():
        w.requires_grad_(True)
    network = Network(setting.layers, setting.table, setting.keep_copies)
    network.per_image = per_image
    # the fused attention kernels have no second derivative
    with network, torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        loss = check_loss(setting.loss_fn(setting.model, batch))
        network.recording = False
        points: dict[str, list[Any]] = {n: [w] for n, w in weights.items()}
        points |= network.aliases()
        flat = [t for tensors in points.values() for t in tensors]
        slopes = iter(torch.autograd.grad(loss, flat, create_graph=True, allow_unused=True))
        gradient = {site: [next(slopes) for _ in tensors] for site, tensors in points.items()}
        for _ in range(steps):
            rows: dict[str, torch.Tensor] = {}
            for site, tensors in points.items():
                rows[site] = _quadratic_form(tensors, gradient[site], sample, per_image[site], images)
            record(rows)
        return {s: network.sizes(s, images) for s in network.aliases()}


def _quadratic_form(
    points: list[torch.Tensor], gradient: list[Any], sample: Sampler, per_image: bool, images: int
) -> torch.Tensor:
    total = torch.zeros(images if per_image else 1, dtype=torch.float64)
    z = [sample(p) for p in points]
    curved = [(g, v) for g, v in zip(gradient, z) if g is not None and g.requires_grad]
    if not curved:
        return total
    products = torch.autograd.grad(
        [g for g, _ in curved], points, [v for _, v in curved], retain_graph=True, allow_unused=True
    )
    for v, h in zip(z, products):
        if h is not None:
            part = (v * h).detach().to(torch.float64)
            total += (part.flatten(1).sum(1) if per_image else part.sum()[None]).cpu()
    return total
