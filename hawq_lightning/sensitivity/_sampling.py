"""Which images to send back in a round: in proportion to the curvature of the loss at their outputs.

In a trained network few images carry the traces: the loss of a confident image is flat. A forward pass over the pool
gives every image's ``h = tr(d2 loss / d output2)``, which follows its traces closely; an image is then drawn with a
probability ``pi`` that grows with ``h``, independently in every round, and what it gives is divided by ``pi``
(Horvitz and Thompson, JASA 47, 1952): unbiased whatever ``pi`` is, since none is zero. Images that carry much have
``pi = 1`` and add no noise of sampling at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from hawq_lightning._batches import batch_images, like, parts_of
from hawq_lightning._errors import HawqError, nearest
from hawq_lightning.sensitivity._boundary import OutputHessian
from hawq_lightning.sensitivity._loss_hessian import Block, Dense, Softmax
from hawq_lightning.sensitivity._microbatch import ImagesOf, pick

DRAWS = ("auto", "all", "curvature")
_PROBE_NOISE = 0.5  # squared relative deviation of one probe of one image, rotated: 0.42 on ResNet20
_FLOOR = 0.1  # share of the draws that goes to images evenly: curvature is a guide, not the truth
_WORTH = 1.5  # least gain for which images are drawn
_FEWEST = 16  # images a round: smaller passes are all overhead


def output_curvature(
    hessian: OutputHessian, blocks: Sequence[Block] | Dense | None, sloped: Sequence[int]
) -> torch.Tensor | None:
    """Trace of the absolute Hessian of the loss at the outputs, one value an image; ``None`` if it is not known.

    Args:
        hessian: at the boundary of a batch whose images are the first axis.
        blocks: its closed forms.
        sloped: tensors that count by their slope (L1 losses).
    """
    if blocks is None:
        return None
    total = torch.zeros(hessian.values[0].shape[0], dtype=torch.float64)
    if isinstance(blocks, Dense):
        return total + blocks.eigenvalues.abs().sum(1).double().cpu()
    for i, (block, gradient) in enumerate(zip(blocks, hessian.gradient)):
        if i in sloped:
            value = gradient.detach().abs()
        elif isinstance(block, Softmax):
            p = block.probability
            value = block.scale * (1 - p.square().sum(block.axis, keepdim=True))
        else:
            value = block.d.abs()
        total += value.double().flatten(1).sum(1).cpu()
    return total.clamp_min(0)


def check_draw(draw: str) -> str:
    """Return ``draw``, or raise HawqError unless it is one of :data:`DRAWS`."""
    if draw not in DRAWS:
        raise HawqError(f"Unknown draw {draw!r}; use one of {', '.join(DRAWS)}.{nearest(str(draw), DRAWS)}")
    return draw


@dataclass(frozen=True)
class SamplingDesign:
    """How likely every image is in a round.

    Attributes:
        probability: one an image, in (0, 1].
        gain: noise at equal work of drawing all images, over that of this design, as far as the curvature predicts it.
    """

    probability: torch.Tensor
    gain: float


def design(curvature: torch.Tensor) -> SamplingDesign:
    """Inclusion probabilities that give the least noise for the work, if traces were as ``curvature``.

    Noise of a round is ``sum ((1 + k) / pi - 1) t^2`` with ``k`` a probe's noise, its work ``sum pi``; their product
    does not depend on how many rounds are run. ``pi = min(1, s a)`` with ``a`` the curvature and an even floor.

    Args:
        curvature: one value an image, not negative.
    """
    h = curvature.double().clamp_min(0)
    count = len(h)
    if count == 0 or not float(h.sum()) > 0:
        return SamplingDesign(torch.ones(count, dtype=torch.float64), 1.0)
    a = (1 - _FLOOR) * h / h.mean() + _FLOOR
    squares = a.square()
    whole = count * _PROBE_NOISE * float(squares.sum())
    best, least = torch.ones_like(a), whole
    fewest = min(count, _FEWEST)
    for exponent in torch.linspace(0.0, 1.0, 65).tolist():
        scale = float(a.max()) ** -1.0 * float(a.max() / a.min()) ** exponent
        pi = (scale * a).clamp_max(1.0)
        if float(pi.sum()) < fewest:
            continue
        product = float(pi.sum()) * float((squares * ((1 + _PROBE_NOISE) / pi - 1)).sum())
        if product < least:
            best, least = pi, product
    return SamplingDesign(best, whole / least)


def pays_off(found: SamplingDesign) -> bool:
    """Whether drawing pays."""
    return found.gain >= _WORTH


def join(parts: Sequence[Any], counts: Sequence[int]) -> Any | None:
    """One batch of several of the same make, image after image; ``None`` where they do not fit together."""
    if len(parts) == 1:
        return parts[0]
    try:
        whole = _join(parts, counts)
        return whole if batch_images(whole) == sum(counts) else None
    except Exception:  # whatever is odd about them, they go one by one
        return None


def _join(parts: Sequence[Any], counts: Sequence[int]) -> Any:
    first = parts[0]
    if isinstance(first, torch.Tensor):
        if all(p.ndim and p.shape[0] == n and p.shape[1:] == first.shape[1:] for p, n in zip(parts, counts)):
            return torch.cat(list(parts))
        raise ValueError("tensors of other shapes")
    inner = [parts_of(p) for p in parts]
    if inner[0]:
        plain = isinstance(first, (list, tuple)) and not hasattr(first, "_fields")
        if plain and all(len(p) == n for p, n in zip(parts, counts)) and not _rows(inner, counts):
            return type(first)([x for p in parts for x in p])
        if len({len(p) for p in inner}) != 1:
            raise ValueError("other numbers of parts")
        return like(first, [_join(values, counts) for values in zip(*inner)])
    if all(p == first for p in parts):
        return first
    raise ValueError("other constants")


def _rows(inner: Sequence[Sequence[Any]], counts: Sequence[int]) -> bool:
    """Whether a list holds tensors with a row an image, rather than an entry an image."""
    return all(isinstance(x, torch.Tensor) and x.ndim > 0 and x.shape[0] == n for p, n in zip(inner, counts) for x in p)


@dataclass(frozen=True)
class Chunk:
    """Images of one or several batches that go through the network together.

    Attributes:
        batch: what the loss gets.
        segments: (number of the batch, positions of the images in it), in order.
    """

    batch: Any
    segments: tuple[tuple[int, torch.Tensor], ...]

    @property
    def images(self) -> int:
        """How many."""
        return sum(len(ids) for _, ids in self.segments)


def chunks(
    kept: Sequence[Any],
    images: Sequence[int],
    chosen: Sequence[tuple[int, torch.Tensor]],
    largest: int,
    batch_size_fn: ImagesOf,
) -> list[Chunk]:
    """Pack chosen images into batches of at most ``largest``, joining batches that fit together.

    Args:
        kept: all batches.
        images: number of images of each.
        chosen: (batch, positions) in order.
        largest: images at a time.
        batch_size_fn: number of images in a batch.

    Raises:
        LookupError: it is not clear how to take images out of a batch.
    """
    out: list[Chunk] = []
    waiting: list[tuple[int, torch.Tensor, Any]] = []

    def flush() -> None:
        if not waiting:
            return
        whole = join([w[2] for w in waiting], [len(w[1]) for w in waiting])
        if whole is not None:
            out.append(Chunk(whole, tuple((n, ids) for n, ids, _ in waiting)))
        else:
            out.extend(Chunk(part, ((n, ids),)) for n, ids, part in waiting)
        waiting.clear()

    for number, ids in chosen:
        for piece in ids.split(largest):
            if not len(piece):
                continue
            part = pick(kept[number], images[number], piece, batch_size_fn)
            if part is None:
                raise LookupError(number)
            if sum(len(w[1]) for w in waiting) + len(piece) > largest:
                flush()
            waiting.append((number, piece, part))
    flush()
    return out
