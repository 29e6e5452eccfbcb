"""Random vectors at the network's outputs, sent back: Tr(H_l) = E ||J_l^T L z||^2 with L L^T the loss's Hessian there.

J_l is the Jacobian of the outputs by the tensor of site l, z has E[z z^T] = I. One backward pass gives the squared norm
at every weight and activation, without double backward through the network and without noise leaking between layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from hawq_lightning._types import Batch
from hawq_lightning.sensitivity._boundary import OutputHessian
from hawq_lightning.sensitivity._context import ForwardPass, MeasureContext, forward_pass, outputs_of
from hawq_lightning.sensitivity._estimator import ProbeRequest, Probes, Rows
from hawq_lightning.sensitivity._grad_capture import with_copies
from hawq_lightning.sensitivity._heap import release_memory
from hawq_lightning.sensitivity._independence import check_independent
from hawq_lightning.sensitivity._loss_hessian import (
    Block,
    Dense,
    Diagonal,
    ProbeVectors,
    Softmax,
    factor_probe,
    factorize_loss_hessian,
    output_curvature,
    without_curvature,
)


@dataclass(frozen=True)
class RademacherProbes:
    """Random signs for the outputs; of samples from several batches each gets what it would have in its own.

    Attributes:
        parts: (number of samples, seed) of each batch that the samples come from.
    """

    parts: Sequence[tuple[int, int]]

    def generators(self) -> list[torch.Generator]:
        """Fresh, one a part."""
        return [torch.Generator().manual_seed(seed) for _, seed in self.parts]

    def sample(self, shapes: Sequence[torch.Tensor], generators: Sequence[torch.Generator]) -> list[torch.Tensor]:
        """One tensor like each of ``shapes``; ``generators`` go on."""
        if len(self.parts) == 1:
            return [_signs(v.shape, generators[0]).to(v) for v in shapes]
        pieces_of_parts = [
            [_signs((count, *v.shape[1:]), generator) for v in shapes]
            for (count, _), generator in zip(self.parts, generators)
        ]
        return [torch.cat(pieces).to(v) for v, pieces in zip(shapes, zip(*pieces_of_parts))]


def _signs(shape: Sequence[int], generator: torch.Generator) -> torch.Tensor:
    return torch.randint(0, 2, tuple(shape), generator=generator, dtype=torch.float32).mul_(2).sub_(1)


def backpropagate(forward: ForwardPass, vectors: ProbeVectors, last: bool = False) -> Rows:
    """Rows of every site for one probe: the squared norms of what it gives at each site.

    Args:
        forward: a forward pass.
        vectors: what to send back from the outputs.
        last: no further probe follows, so that the graph is freed on the way.

    Returns:
        site -> float64 (rows,).
    """
    rows: Rows = {}
    network, hessian = forward.network, forward.hessian
    if vectors.cross_pair is not None:
        z, hz = vectors.cross_pair
        network.products(lambda: hessian.backward(z), lambda: hessian.backward(hz, last and not vectors.pairs), rows)
    for i, (coefficient, tensors) in enumerate(vectors.pairs):
        end = last and i == len(vectors.pairs) - 1
        network.last_pass = end
        network.squares(lambda v=tensors, e=end: hessian.backward(v, e), coefficient, rows)  # type: ignore[misc]
    return rows


@dataclass
class FactoredPass:
    """A forward pass with the factors of its loss's Hessian.

    Attributes:
        forward: the pass.
        blocks: closed forms, see :func:`factorize_loss_hessian`.
        l1_outputs: numbers of the outputs that count by their slope.
        probes: filled by whoever sends vectors back; sizes and curvature are there.
    """

    forward: ForwardPass
    blocks: list[Block] | Dense | None
    l1_outputs: list[int]
    probes: Probes

    @property
    def elementwise(self) -> bool:
        """Whether the loss is, in every output."""
        return isinstance(self.blocks, list) and all(isinstance(b, Diagonal) for b in self.blocks)

    def probe(
        self, z: Sequence[torch.Tensor], *, rotate: bool = True, concave: float = 1.0, last: bool = False
    ) -> Rows:
        """Rows of one probe.

        Args:
            z: signs, one tensor an output.
            rotate: onto the softmax factor's singular vectors.
            concave: how often the concave part of the loss counts.
            last: frees the graph on the way.
        """
        vectors = factor_probe(
            self.forward.hessian, self.blocks, z, rotate=rotate, l1_outputs=self.l1_outputs, concave=concave
        )
        return backpropagate(self.forward, vectors, last=last)

    def append(self, rows: Rows) -> None:
        """Note the rows of a probe, with what its passes gave along rounding errors."""
        self.probes.rows.append(rows)
        if forms := self.forward.network.take_forms():
            self.probes.forms.append(forms)


def factored_probes(
    context: MeasureContext, request: ProbeRequest, run: Callable[[FactoredPass], None], *, elementwise: bool = False
) -> Probes:
    """Run the loss of a request and let ``run`` send vectors back.

    Args:
        context: model, loss and sites.
        request: samples.
        run: appends to ``probes.rows`` of the pass.
        elementwise: the loss is known to be.
    """
    probes, large = with_copies(
        context.diagnostics.overwritten, lambda: _factored_probes(context, request, run, elementwise)
    )
    if large:  # the graph went with the frame above, and as much memory as it took
        release_memory()
    return probes


def _factored_probes(
    context: MeasureContext, request: ProbeRequest, run: Callable[[FactoredPass], None], elementwise: bool
) -> tuple[Probes, bool]:
    with forward_pass(context, request.batch, request.per_sample) as forward:
        if request.first_probe == 0 and request.batch_number and any(request.per_sample.values()):
            check_independent(forward.hessian, request.samples, request.batch_number)
        sizes = {s: forward.network.sizes(s, request.samples) for s in forward.network.aliases()}
        blocks = _blocks(context, forward.hessian, any(request.per_sample.values()), elementwise)
        l1_outputs = _l1_outputs(context, forward.hessian, blocks)
        curvature = output_curvature(forward.hessian, blocks, l1_outputs) if request.curvature else None
        if blocks is not None:
            forward.free_loss()
        probes = Probes([], sizes, curvature)
        run(FactoredPass(forward, blocks, l1_outputs, probes))
        return probes, forward.hessian.large


def output_curvature_of(context: MeasureContext, batch: Batch) -> torch.Tensor | None:
    """Curvature of the loss at the outputs (samples,), from a forward pass alone; see :mod:`._sampling`.

    Only for losses and networks that do not couple samples; ``None`` where the loss has no closed form.
    """
    with outputs_of(context, batch) as hessian:
        blocks = _blocks(context, hessian, True)
        return output_curvature(hessian, blocks, _l1_outputs(context, hessian, blocks))


def sees_curvature(context: MeasureContext, batch: Batch) -> bool:
    """Whether probes at the outputs have anything to send back: curvature of the loss, or slopes that count as it."""
    with outputs_of(context, batch) as hessian:
        generator = torch.Generator().manual_seed(0)
        if any(bool(h.any()) for h in hessian(hessian.random_vectors(generator))):
            return True
        return context.l1_curvature == "fisher" and bool(without_curvature(hessian, None, generator))


def concave_share(context: MeasureContext, batch: Batch) -> tuple[float, float]:
    """Concave curvature of the loss at the outputs, and all of it; zeros where it has no closed form."""
    with outputs_of(context, batch) as hessian:
        blocks = factorize_loss_hessian(hessian, torch.Generator().manual_seed(0))
        if not isinstance(blocks, list):
            return 0.0, 0.0
        curvature = [b.d for b in blocks if isinstance(b, Diagonal)]
        return sum(-float(d.clamp_max(0).sum()) for d in curvature), sum(float(d.abs().sum()) for d in curvature)


def _l1_outputs(context: MeasureContext, hessian: OutputHessian, blocks: list[Block] | Dense | None) -> list[int]:
    """Numbers of the outputs along which the loss has slope and no curvature, where these are to count."""
    if context.l1_curvature != "fisher":
        return []
    outputs = without_curvature(hessian, blocks, torch.Generator().manual_seed(0))
    if outputs:
        names = ", ".join(dict.fromkeys(hessian.names[i] or "the model" for i in outputs))
        context.diagnostics.warn_once(
            f"The loss has slope but no curvature in the output of {names}, as L1 losses do: the Fisher information of "
            "a Laplace distribution of unit scale was taken in its place (l1_curvature='fisher')."
        )
    return outputs


def _blocks(
    context: MeasureContext, hessian: OutputHessian, by_sample: bool, elementwise: bool = False
) -> list[Block] | Dense | None:
    """Factors of the loss's Hessian; the user is told where they are none or the general form."""
    if hessian.linear and context.l1_curvature == "zero":
        context.diagnostics.warn_once(
            "The loss is linear in the network's outputs, or forbids a second derivative: it has no curvature in them."
        )
    blocks = factorize_loss_hessian(hessian, torch.Generator().manual_seed(0), by_sample, elementwise)
    if blocks is None:
        context.diagnostics.warn_once(
            "The loss is neither softmax cross-entropy nor elementwise: its traces take more probes, being noisier."
        )
    elif isinstance(blocks, list) and len(blocks) == 1 and isinstance(blocks[0], Softmax):
        context.diagnostics.figures["classes"] = blocks[0].probability.shape[blocks[0].axis]
    return blocks
