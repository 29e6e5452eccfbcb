"""Factors of the loss's Hessian at the boundary: random vectors u with E[u u^T] equal to it.

Softmax cross-entropy (any smoothing, soft labels, class weights, reduction) and elementwise losses are recognised by
probing the operator, never by name. Of any other loss that treats images independently the Hessian is formed and
split into its positive and negative part, if an image has few outputs; what is left gets the general two-backward form
<J^T z, J^T H z>.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from hawq_lightning._errors import HawqError
from hawq_lightning.sensitivity._boundary import OutputHessian

_FULL_ROTATION = 32  # classes; beyond it only the most likely ones are rotated


@dataclass
class Softmax:
    """``c_n (diag(p) - p p^T)`` for every row n of ``probability``; ``axis`` holds the classes."""

    probability: torch.Tensor
    scale: torch.Tensor
    axis: int
    rotation: torch.Tensor | None = None

    def factor(self, z: torch.Tensor) -> torch.Tensor:
        """``sqrt(c) (sqrt(p) z - p <sqrt(p), z>)``."""
        root = self.probability.sqrt()
        return self.scale.sqrt() * (root * z - self.probability * (root * z).sum(self.axis, keepdim=True))

    def rotated(self, z: torch.Tensor) -> torch.Tensor:
        """``z`` rotated onto the factor's singular vectors: same mean, up to 7 times less variance."""
        if self.rotation is None:
            p = self.probability.movedim(self.axis, -1)
            p = p.to(torch.promote_types(p.dtype, torch.float32))  # no eigenvectors in half precision
            classes = min(_FULL_ROTATION, p.shape[-1])
            self._top = p.topk(classes, -1).indices if classes < p.shape[-1] else None
            q = p if self._top is None else p.gather(-1, self._top)
            square = (p * p).sum(-1)[..., None, None]
            eye = torch.eye(classes, dtype=p.dtype, device=p.device)
            gram = (q[..., :, None] * q[..., None, :]).sqrt() * (eye - q[..., :, None] - q[..., None, :] + square)
            self.rotation = torch.linalg.eigh(gram).eigenvectors.to(self.probability.dtype)
        x = z.movedim(self.axis, -1)
        if self._top is None:
            y = torch.matmul(self.rotation, x[..., None])[..., 0]
        else:
            y = x.scatter(-1, self._top, torch.matmul(self.rotation, x.gather(-1, self._top)[..., None])[..., 0])
        return y.movedim(-1, self.axis)


@dataclass
class Diagonal:
    """An elementwise loss: second derivative ``d`` of either sign."""

    d: torch.Tensor


Block = Softmax | Diagonal


@dataclass
class Dense:
    """The Hessian of every image over all its outputs, as eigenvalues (N, D) and eigenvectors (N, D, D)."""

    eigenvalues: torch.Tensor
    vectors: torch.Tensor

    def factor(self, z: Sequence[torch.Tensor], sign: float) -> list[torch.Tensor]:
        """``V sqrt(max(sign * lambda, 0)) z``, an output tensor each."""
        flat = torch.cat([_by_sample(v) for v in z], 1)
        root = (sign * self.eigenvalues).clamp_min(0).sqrt()
        u = torch.matmul(self.vectors, (root * flat)[..., None])[..., 0]
        parts = u.split([v[0].numel() for v in z], 1)
        return [part.reshape(v.shape) for part, v in zip(parts, z)]


def _by_sample(x: torch.Tensor) -> torch.Tensor:
    """``[samples, numbers of a sample]``, also of one number a sample, as log-determinants are."""
    return x.reshape(len(x), -1)


def dense(hessian: OutputHessian) -> Dense | None:
    """Form the Hessian of every image, all images at once; ``None`` where an image has too many outputs.

    Only for losses that do not couple images.
    """
    values = hessian.values
    samples = values[0].shape[0]
    counts = [v[0].numel() for v in values]
    if sum(counts) > hessian.dense_outputs:
        return None
    rows = []
    for i, count in enumerate(counts):
        for j in range(count):
            unit = [torch.zeros_like(v) for v in values]
            unit[i].view(samples, -1)[:, j] = 1.0
            rows.append(torch.cat([_by_sample(h) for h in hessian(unit)], 1))
    matrix = torch.stack(rows, 1).to(torch.float64)
    eigenvalues, vectors = torch.linalg.eigh((matrix + matrix.mT) / 2)
    noise = (1e-10 if values[0].dtype == torch.float64 else 1e-5) * eigenvalues.abs().max()
    eigenvalues = torch.where(eigenvalues.abs() > noise, eigenvalues, 0.0)
    return Dense(eigenvalues.to(values[0]), vectors.to(values[0]))


def factorize_loss_hessian(
    hessian: OutputHessian, generator: torch.Generator, by_sample: bool = False, elementwise: bool = False
) -> list[Block] | Dense | None:
    """Closed forms for every boundary tensor; the dense Hessian of every image; or ``None``: the general form.

    Two products with the operator decide on closed forms: one with a random vector over all tensors at once, one with
    all ones.

    Args:
        hessian: the operator.
        generator: of the random vector.
        by_sample: the loss does not couple images, and the first axis of every tensor is the images.
        elementwise: an earlier look at the same batch has said so.
    """
    if elementwise:
        return [Diagonal(d) for d in hessian([v.new_ones(()).expand_as(v) for v in hessian.values])]
    state = generator.get_state()
    update = hessian([_normal(v, generator) for v in hessian.values])
    diagonal = hessian([v.new_ones(()).expand_as(v) for v in hessian.values])
    for name, h in zip(hessian.names, update):
        if not bool(torch.isfinite(h).all()):
            raise HawqError(
                f"The second derivative of the loss in the output of {name or 'the model'} is not finite, as that of "
                "sqrt, norm or a quotient is at 0: add a small constant there."
            )
    size = max((float(h.abs().max()) for h in update if h.numel()), default=0.0)
    blocks: list[Block] = []
    generator.set_state(state)  # drawn again, not kept in memory: outputs may be as large as the network's activations
    for f, h, d in zip(hessian.values, update, diagonal):
        v = _normal(f, generator)
        share = 1e-4 if f.dtype == torch.float64 else max(3e-3, 4 * hessian.rounding)
        tolerance = share * float(h.norm()) + 1e-7 * size
        if float((h - d * v).norm()) <= tolerance:
            blocks.append(Diagonal(d))
            continue
        block = _softmax(f, v, h, tolerance)
        if block is None:
            return dense(hessian) if by_sample else None
        blocks.append(block)
    return blocks


def _normal(like: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    wide = torch.promote_types(like.dtype, torch.float32)
    return torch.randn(like.shape, generator=generator, dtype=wide).to(like)


def without_curvature(
    hessian: OutputHessian, blocks: Sequence[Block] | Dense | None, generator: torch.Generator
) -> list[int]:
    """Boundary tensors along which the loss has slope but no second derivative at all: L1 losses.

    A softmax whose probabilities are all 0 or 1 has none either; its slopes give it away.
    """
    if isinstance(blocks, list):
        has_curvature = [isinstance(b, Softmax) or bool(b.d.any()) for b in blocks]
    else:
        has_curvature = [bool(h.any()) for h in hessian([_normal(v, generator) for v in hessian.values])]
    flat = [
        i
        for i, (c, g) in enumerate(zip(has_curvature, hessian.gradient))
        if not c and bool(g.any()) and not saturated(hessian.values[i], g)
    ]
    slopes = torch.cat([hessian.gradient[i].flatten() for i in flat]) if flat else torch.zeros(0)
    if len(flat) == len(has_curvature) and (bool((slopes >= 0).all()) or bool((slopes <= 0).all())):
        return []  # slopes of one sign everywhere: a linear loss, which pulls to no value
    return flat


def saturated(f: torch.Tensor, gradient: torch.Tensor) -> bool:
    """Whether slopes are those of a cross-entropy whose probabilities are all 0 or 1.

    These are ``c (p - q)`` with p one-hot at the largest output and q a distribution: positive there alone, and of sum
    zero. Of two classes an L1 loss may have such slopes by chance; then the outputs must be far apart as well.
    """
    for axis in dict.fromkeys((1, f.ndim - 1)) if f.ndim > 1 else range(f.ndim):
        if f.shape[axis] < 2:
            continue
        largest = torch.zeros_like(f, dtype=torch.bool).scatter_(axis, f.argmax(axis, keepdim=True), True)
        certain = f.shape[axis] > 2 or bool((torch.softmax(f, axis)[~largest] == 0).all())
        below = bool((gradient[~largest] <= 0).all())
        balanced = bool((gradient.sum(axis).abs() <= 1e-4 * gradient.abs().sum(axis)).all())
        if certain and below and balanced:
            return True
    return False


def output_curvature(
    hessian: OutputHessian, blocks: Sequence[Block] | Dense | None, l1_outputs: Sequence[int]
) -> torch.Tensor | None:
    """Trace of the absolute Hessian of the loss at the outputs, (samples,); ``None`` if it is not known.

    Args:
        hessian: at the boundary of a batch whose samples are the first axis.
        blocks: its closed forms.
        l1_outputs: tensors that count by their slope (L1 losses).
    """
    if blocks is None:
        return None
    total = torch.zeros(hessian.values[0].shape[0], dtype=torch.float64)
    if isinstance(blocks, Dense):
        return total + blocks.eigenvalues.abs().sum(1).double().cpu()
    for i, (block, gradient) in enumerate(zip(blocks, hessian.gradient)):
        if i in l1_outputs:
            value = gradient.detach().abs()
        elif isinstance(block, Softmax):
            p = block.probability
            value = block.scale * (1 - p.square().sum(block.axis, keepdim=True))
        else:
            value = block.d.abs()
        total += _by_sample(value.double()).sum(1).cpu()
    return total.clamp_min(0)


def _softmax(f: torch.Tensor, v: torch.Tensor, h: torch.Tensor, tolerance: float) -> Softmax | None:
    for axis in dict.fromkeys((1 % f.ndim, f.ndim - 1)):
        if f.ndim == 1 and axis == 0 and f.shape[0] < 2:
            continue
        p = torch.softmax(f, axis)
        q = p * (v - (p * v).sum(axis, keepdim=True))
        norm = (q * q).sum(axis, keepdim=True)
        scale = (q * h).sum(axis, keepdim=True) / norm.clamp_min(torch.finfo(f.dtype).tiny)
        if float((h - scale * q).norm()) <= tolerance and float(scale.min()) >= -1e-6 * float(scale.abs().max()):
            # a saturated image has no curvature left to measure its scale by; take its neighbours'
            significant = norm > 1e-10 * norm.max()
            typical = scale[significant].median() if bool(significant.any()) else scale.max()
            return Softmax(p, torch.where(significant, scale, typical).clamp_min(0), axis)
    return None


@dataclass
class ProbeVectors:
    """What to send back through the network, tensors like the outputs.

    Attributes:
        pairs: (coefficient, vectors) whose squared gradient norms, times the coefficient, add up.
        cross_pair: vectors z and H z; the inner product of their gradients is added.
    """

    pairs: list[tuple[float, list[torch.Tensor]]]
    cross_pair: tuple[list[torch.Tensor], list[torch.Tensor]] | None = None


def factor_probe(
    hessian: OutputHessian,
    blocks: Sequence[Block] | Dense | None,
    z: Sequence[torch.Tensor],
    *,
    rotate: bool = True,
    l1_outputs: Sequence[int] = (),
    concave: float = 1.0,
) -> ProbeVectors:
    """Turn sign vectors ``z`` (one a boundary tensor) into what is sent back through the network.

    Elementwise losses that are concave in places (focal) need two backward passes, one a sign: unbiased, unlike
    clipping. Tensors numbered in ``l1_outputs`` get the Fisher information of a Laplace distribution of unit scale,
    ``|g|`` at slope g, in place of their zero Hessian.

    Args:
        hessian: the operator.
        blocks: its closed forms.
        z: signs.
        rotate: rotate the signs onto the softmax factor.
        l1_outputs: tensors that count by their slope.
        concave: how often the concave part counts; 0 leaves it to another probe, which counts it several times.
    """
    laplace = [torch.zeros(()).to(v).expand_as(v) for v in z]
    for i in l1_outputs:
        laplace[i] = hessian.gradient[i].detach().abs().sqrt() * z[i]
    apart = [(1.0, laplace)] if l1_outputs else []
    if blocks is None:
        return ProbeVectors(apart, (list(z), hessian(z)))
    plus: list[torch.Tensor] = []
    minus: list[torch.Tensor] = []
    if isinstance(blocks, Dense):  # its signs belong to eigenvectors, not to outputs: not independent of the slopes'
        plus, minus, blocks = blocks.factor(z, 1.0), blocks.factor(z, -1.0) if concave else [], ()
    else:
        apart = []
    for block, signs, slope in zip(blocks, z, laplace):
        if isinstance(block, Softmax):
            plus.append(block.factor(block.rotated(signs) if rotate else signs))
        else:
            plus.append(block.d.clamp_min(0).sqrt() * signs + slope)  # where there is slope there is no curvature
        if concave:
            below = (-block.d).clamp_min(0).sqrt() if isinstance(block, Diagonal) else torch.zeros(()).to(signs)
            minus.append(below * signs)
    pairs = [(1.0, plus), *apart]
    if any(bool(m.any()) for m in minus):
        pairs.append((-concave, minus))
    return ProbeVectors(pairs)
