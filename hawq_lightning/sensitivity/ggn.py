"""Output-space Gauss-Newton probes: Tr(H_l) = E ||J_l^T L z||^2 with L L^T the loss's Hessian at the network's output.

One backward pass gives every weight and activation trace, without double backward through the network and without
noise leaking between layers. Exact in the mean wherever the network is piecewise linear in each layer's weights
(convolution, linear, ReLU, max and average pooling, BatchNorm in evaluation mode), and a Gauss-Newton approximation
elsewhere (Schraudolph, Neural Computation 14, 2002).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from hawq_lightning.errors import HawqError
from hawq_lightning.sensitivity.boundary import OutputHessian
from hawq_lightning.sensitivity.curvature import Block, Dense, Draw, Softmax, draw, recognise, without_curvature
from hawq_lightning.sensitivity.forward import Pass, Setting, forward_pass
from hawq_lightning.sensitivity.network import Overwritten

MAX_COLUMNS = 4096


def signs(shapes: Sequence[torch.Tensor], generator: torch.Generator) -> list[torch.Tensor]:
    """Random signs (Rademacher), one tensor like each of ``shapes``."""
    return [torch.randint(0, 2, v.shape, generator=generator).mul_(2).sub_(1).to(v) for v in shapes]


def columns(values: Sequence[torch.Tensor], images: int, by_image: bool) -> Iterable[list[torch.Tensor]]:
    """Every unit vector of the output; where images are independent, of all images at once.

    Raises:
        HawqError: there are more than 4,096 of them.
    """
    counts = [v.numel() // images if by_image else v.numel() for v in values]
    if sum(counts) > MAX_COLUMNS:
        raise HawqError(f"estimator='exact' would need {sum(counts)} backward passes a batch; use 'ggn'.")
    for i, count in enumerate(counts):
        for j in range(count):
            out = [torch.zeros_like(x) for x in values]
            (out[i].view(images, -1)[:, j] if by_image else out[i].view(-1)[j : j + 1]).fill_(1.0)
            yield out


def send_back(step: Pass, what: Draw) -> dict[str, torch.Tensor]:
    """Rows of every site for one probe."""
    rows: dict[str, torch.Tensor] = {}
    if what.two is not None:
        z, hz = what.two
        step.network.products(lambda: step.hessian.backward(z), lambda: step.hessian.backward(hz), rows)
    for coefficient, vectors in what.pairs:
        step.network.squares(lambda v=vectors: step.hessian.backward(v), coefficient, rows)  # type: ignore[misc]
    return rows


def independent_images(setting: Setting, batch: Any, images: int) -> dict[str, bool]:
    """Site -> whether image 0's outputs alone reach row 0 alone of what its layers read and return.

    Also the loss: whether its Hessian leaks from image 0 to others. Both are tried, not assumed.
    """
    if images < 2:
        return {s.name: False for s in setting.table}
    nothing = {s.name: False for s in setting.table}
    with forward_pass(setting, batch, nothing) as step:
        values = step.hessian.values
        if any(v.ndim == 0 or v.shape[0] != images for v in values):
            setting.note("Rows of the loss's inputs are not images: whole batches are the unit of the traces.")
            return nothing
        generator = torch.Generator().manual_seed(0)
        first = [torch.randn(v.shape, generator=generator).to(v) for v in values]
        for v in first:
            v[1:] = 0
        if any(bool(h[1:].any()) for h in step.hessian(first)):
            setting.note("The loss couples the images of a batch: whole batches are the unit of the traces.")
            return nothing
        network = step.network
        network.recording, network.images, network.leaks = False, images, {}
        step.hessian.backward(first)
        leaks = network.leaks
    shared = [n for n, leak in leaks.items() if leak]
    if shared:
        setting.note(f"Rows are not images at {', '.join(shared[:3])}{'...' if len(shared) > 3 else ''}: batch sums.")
    return {s.name: not leaks.get(s.name, True) for s in setting.table}


def probe_batch(
    setting: Setting,
    batch: Any,
    images: int,
    per_image: Mapping[str, bool],
    generator: torch.Generator,
    probes: int,
    record: Callable[[dict[str, torch.Tensor]], None],
    *,
    rotate: bool = True,
    exact: bool = False,
) -> dict[str, torch.Tensor]:
    """Send ``probes`` random vectors (or every column) of one batch back; ``record`` gets the rows of each.

    Returns:
        activation site -> elements of each row.
    """
    while True:
        try:
            with forward_pass(setting, batch, per_image) as step:
                blocks = _blocks(setting, step.hessian, generator, any(per_image.values()))
                sloped = _sloped(setting, step.hessian, generator)
                results = []
                if exact:
                    total: dict[str, torch.Tensor] = {}
                    by_image = all(per_image.values())
                    for z in columns(step.hessian.values, images, by_image):
                        for site, value in send_back(
                            step, draw(step.hessian, blocks, z, rotate=False, sloped=sloped)
                        ).items():
                            total[site] = total[site] + value if site in total else value
                    results.append(total)
                else:
                    for _ in range(probes):
                        z = signs(step.hessian.values, generator)
                        results.append(send_back(step, draw(step.hessian, blocks, z, rotate=rotate, sloped=sloped)))
                sizes = {s: step.network.sizes(s, images) for s in step.network.aliases()}
            for rows in results:
                record(rows)
            return sizes
        except Overwritten as which:
            setting.keep_copies.add(str(which))


def _sloped(setting: Setting, hessian: OutputHessian, generator: torch.Generator) -> list[int]:
    if setting.l1 != "fisher":
        return []
    found = without_curvature(hessian, generator)
    if found:
        names = ", ".join(dict.fromkeys(hessian.names[i] or "the model" for i in found))
        setting.note(
            f"The loss has slope but no curvature in the output of {names}, as L1 losses do: the Fisher information of "
            "a Laplace distribution of unit scale was taken in its place (l1='fisher')."
        )
    return found


def _blocks(
    setting: Setting, hessian: OutputHessian, generator: torch.Generator, by_image: bool
) -> list[Block] | Dense | None:
    if hessian.linear and setting.l1 == "zero":
        setting.note(
            "The loss is linear in the network's outputs, or forbids a second derivative: no curvature was found."
        )
    blocks = recognise(hessian, generator, by_image)
    if blocks is None:
        setting.note(
            "The loss is neither softmax cross-entropy nor elementwise: the general form with more noise was used."
        )
    elif isinstance(blocks, list) and len(blocks) == 1 and isinstance(blocks[0], Softmax):
        setting.facts["classes"] = blocks[0].probability.shape[blocks[0].axis]
    return blocks
