"""Output-space Gauss-Newton probes: Tr(H_l) = E ||J_l^T L z||^2 with L L^T the loss's Hessian at the network's output.

One backward pass gives every weight and activation trace, without double backward through the network and without
noise leaking between layers. Exact in the mean wherever the network is piecewise linear in each layer's weights
(convolution, linear, ReLU, max and average pooling, BatchNorm in evaluation mode), and a Gauss-Newton approximation
elsewhere (Schraudolph, Neural Computation 14, 2002).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from hawq_lightning._errors import HawqError
from hawq_lightning.sensitivity._boundary import OutputHessian
from hawq_lightning.sensitivity._context import ForwardPass, MeasureContext, forward_pass, outputs_of
from hawq_lightning.sensitivity._grad_capture import Overwritten
from hawq_lightning.sensitivity._isolate import release_memory
from hawq_lightning.sensitivity._loss_hessian import (
    Block,
    Dense,
    Diagonal,
    ProbeVectors,
    Softmax,
    draw,
    factorize_loss_hessian,
    without_curvature,
)
from hawq_lightning.sensitivity._sampling import output_curvature

MAX_COLUMNS = 4096


@dataclass(frozen=True)
class RademacherProbes:
    """Random signs (Rademacher) for the outputs; a batch joined of several draws for each of them what it would alone.

    Args:
        parts: (images, seed) of each batch that the images come from.
    """

    parts: Sequence[tuple[int, int]]

    def generators(self) -> list[torch.Generator]:
        """Fresh, one a part."""
        return [torch.Generator().manual_seed(seed) for _, seed in self.parts]

    def draw(self, shapes: Sequence[torch.Tensor], generators: Sequence[torch.Generator]) -> list[torch.Tensor]:
        """One tensor like each of ``shapes``; ``generators`` go on."""
        if len(self.parts) == 1:
            return [_signs(v.shape, generators[0]).to(v) for v in shapes]
        drawn = [
            [_signs((count, *v.shape[1:]), generator) for v in shapes]
            for (count, _), generator in zip(self.parts, generators)
        ]
        return [torch.cat(pieces).to(v) for v, pieces in zip(shapes, zip(*drawn))]


def _signs(shape: Sequence[int], generator: torch.Generator) -> torch.Tensor:
    return torch.randint(0, 2, tuple(shape), generator=generator, dtype=torch.float32).mul_(2).sub_(1)


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


def send_back(step: ForwardPass, what: ProbeVectors, last: bool = False) -> dict[str, torch.Tensor]:
    """Rows of every site for one probe; the ``last`` one frees the graph as it goes."""
    rows: dict[str, torch.Tensor] = {}
    network, hessian = step.network, step.hessian
    if what.two is not None:
        z, hz = what.two
        network.products(lambda: hessian.backward(z), lambda: hessian.backward(hz, last and not what.pairs), rows)
    for i, (coefficient, vectors) in enumerate(what.pairs):
        end = last and i == len(what.pairs) - 1
        network.last_pass = end
        network.squares(lambda v=vectors, e=end: hessian.backward(v, e), coefficient, rows)  # type: ignore[misc]
    return rows


def independent_images(setting: MeasureContext, batch: Any, images: int) -> dict[str, bool]:
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
        step.let_go_of_loss()
        network = step.network
        network.recording, network.images, network.leaks = False, images, {}
        step.hessian.backward(first, last=True)
        leaks = network.leaks
    shared = [n for n, leak in leaks.items() if leak]
    if shared:
        setting.note(f"Rows are not images at {', '.join(shared[:3])}{'...' if len(shared) > 3 else ''}: batch sums.")
    return {s.name: not leaks.get(s.name, True) for s in setting.table}


@dataclass
class Probed:
    """What probing a batch gives.

    Attributes:
        rows: of every probe: site -> a value a row.
        sizes: activation site -> elements of each row.
        curvature: of the loss at the outputs, one value an image, where it was asked for and is known.
        elementwise: the loss is, in every one of the network's outputs.
    """

    rows: list[dict[str, torch.Tensor]]
    sizes: dict[str, torch.Tensor]
    curvature: torch.Tensor | None = None
    elementwise: bool = False


def probe_batch(
    setting: MeasureContext,
    batch: Any,
    images: int,
    per_image: Mapping[str, bool],
    signs: RademacherProbes,
    probes: int,
    *,
    rotate: bool = True,
    exact: bool = False,
    curvature: bool = False,
    concave: Sequence[float] = (),
    elementwise: bool = False,
) -> Probed:
    """Send ``probes`` random vectors (or every column) of one batch back.

    Args:
        setting: model, loss and sites.
        batch: one batch.
        images: its size.
        per_image: site -> whether its rows are images.
        signs: of the random vectors.
        probes: how many.
        rotate: rotate the signs onto the softmax factor.
        exact: every column instead.
        curvature: also tell that of the loss at the outputs.
        concave: for every probe, how often the concave part counts; once in each by default.
        elementwise: the loss is known to be.
    """
    while True:
        try:
            with forward_pass(setting, batch, per_image) as step:
                generators = signs.generators()
                sizes = {s: step.network.sizes(s, images) for s in step.network.aliases()}
                blocks = _blocks(setting, step.hessian, any(per_image.values()), elementwise)
                sloped = _sloped(setting, step.hessian, blocks)
                known = output_curvature(step.hessian, blocks, sloped) if curvature else None
                if blocks is not None:
                    step.let_go_of_loss()
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
                    for k in range(probes):
                        z = signs.draw(step.hessian.values, generators)
                        share = concave[k] if concave else 1.0
                        what = draw(step.hessian, blocks, z, rotate=rotate, sloped=sloped, concave=share)
                        results.append(send_back(step, what, last=k == probes - 1))
                plain = isinstance(blocks, list) and all(isinstance(b, Diagonal) for b in blocks)
                large = step.hessian.large
            if large:  # the graph is gone, and as much memory as it took
                del step, blocks
                release_memory()
            return Probed(results, sizes, known, plain)
        except Overwritten as which:
            setting.keep_copies.add(str(which))


def pool_curvature(setting: MeasureContext, batch: Any) -> torch.Tensor | None:
    """Curvature of the loss at the outputs, one value an image, from a forward pass alone; see :mod:`.draws`.

    Only for losses and networks that do not couple images; ``None`` where the loss has no closed form.
    """
    with outputs_of(setting, batch) as hessian:
        blocks = _blocks(setting, hessian, True)
        return output_curvature(hessian, blocks, _sloped(setting, hessian, blocks))


def concave_share(setting: MeasureContext, batch: Any) -> tuple[float, float]:
    """Concave curvature of the loss at the outputs, and all of it; zeros where it has no closed form."""
    with outputs_of(setting, batch) as hessian:
        blocks = factorize_loss_hessian(hessian, torch.Generator().manual_seed(0))
        if not isinstance(blocks, list):
            return 0.0, 0.0
        curvature = [b.d for b in blocks if isinstance(b, Diagonal)]
        return sum(-float(d.clamp_max(0).sum()) for d in curvature), sum(float(d.abs().sum()) for d in curvature)


def _sloped(setting: MeasureContext, hessian: OutputHessian, blocks: list[Block] | Dense | None) -> list[int]:
    if setting.l1 != "fisher":
        return []
    found = without_curvature(hessian, blocks, torch.Generator().manual_seed(0))
    if found:
        names = ", ".join(dict.fromkeys(hessian.names[i] or "the model" for i in found))
        setting.note(
            f"The loss has slope but no curvature in the output of {names}, as L1 losses do: the Fisher information of "
            "a Laplace distribution of unit scale was taken in its place (l1='fisher')."
        )
    return found


def _blocks(
    setting: MeasureContext, hessian: OutputHessian, by_image: bool, elementwise: bool = False
) -> list[Block] | Dense | None:
    if hessian.linear and setting.l1 == "zero":
        setting.note(
            "The loss is linear in the network's outputs, or forbids a second derivative: no curvature was found."
        )
    blocks = factorize_loss_hessian(hessian, torch.Generator().manual_seed(0), by_image, elementwise)
    if blocks is None:
        setting.note(
            "The loss is neither softmax cross-entropy nor elementwise: the general form with more noise was used."
        )
    elif isinstance(blocks, list) and len(blocks) == 1 and isinstance(blocks[0], Softmax):
        setting.facts["classes"] = blocks[0].probability.shape[blocks[0].axis]
    return blocks
