"""Top eigenvalues and eigenvectors of each site's Hessian block: HAWQ's first metric, Table 5, loss landscapes.

All sites advance together, each on its own block, by :class:`LobpcgState`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import nn

from hawq_lightning._batches import batch_images
from hawq_lightning._errors import HawqError, choice
from hawq_lightning._progress import progress_bar
from hawq_lightning._site_table import SiteTable
from hawq_lightning._sites import find_sites
from hawq_lightning._types import Batch, LossFn
from hawq_lightning.sensitivity._batch_set import BatchSet
from hawq_lightning.sensitivity._context import ForwardPass, MeasureContext, check_weights
from hawq_lightning.sensitivity._double_backward import GradGraph, gradients_of
from hawq_lightning.sensitivity._first_loss import check_float
from hawq_lightning.sensitivity._grad_capture import with_copies
from hawq_lightning.sensitivity._independence import samples_apart
from hawq_lightning.sensitivity._isolate import isolated_eval
from hawq_lightning.sensitivity._lobpcg import LobpcgState
from hawq_lightning.sensitivity._process_shard import ProcessShard
from hawq_lightning.sensitivity._repeatable import repeatable

Curvature = Literal["ggn", "hessian"]
Apply = Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]
"""From site -> vectors (rows, elements) to site -> products with the site's block."""


@dataclass(frozen=True)
class Eigenpairs:
    """The largest eigenvalues of one site's block, in falling order.

    Attributes:
        values: of the mean loss for weights; for activations the mean over samples of each sample's.
        vectors: of unit norm and the weight's shape; empty for activations, which have one an image.
        residuals: ``|H v - value v| / |value|``: an eigenvalue lies within this share.
    """

    values: tuple[float, ...]
    vectors: tuple[torch.Tensor, ...]
    residuals: tuple[float, ...]


def top_eigenvalues(model: nn.Module, batches: Iterable[Batch], loss_fn: LossFn, **kwargs: Any) -> dict[str, float]:
    """Site -> largest eigenvalue of its Hessian block; keywords as in :func:`top_eigenpairs`."""
    return {n: e.values[0] for n, e in top_eigenpairs(model, batches, loss_fn, **kwargs).items()}


def top_eigenpairs(
    model: nn.Module,
    batches: Iterable[Batch],
    loss_fn: LossFn,
    *,
    count: int = 1,
    kind: Curvature = "ggn",
    sites: SiteTable | None = None,
    only: Collection[str] | None = None,
    rtol: float = 0.02,
    max_steps: int = 100,
    seed: int = 0,
    progress: bool = False,
    shard: ProcessShard | None = None,
) -> dict[str, Eigenpairs]:
    """Largest eigenvalues of every site's block of the Hessian (HAWQ, ICCV 2019; compared in the paper's Table 5).

    Args:
        model: any module; left exactly as it was.
        batches: the mean loss over these is meant.
        loss_fn: ``loss_fn(model, batch) -> scalar``.
        count: how many for each weight; activations get one.
        kind: ``ggn``, the Gauss-Newton Hessian, equal to the true one for piecewise linear networks; or ``hessian``.
        sites: found by a forward pass when not given.
        only: names of the sites to work on.
        rtol: stop at this residual, as a share of the eigenvalue.
        max_steps: products a site at the most.
        seed: of the first vectors.
        progress: show a bar.
        shard: of this process, where several work together.

    Returns:
        site name -> eigenvalues, eigenvectors, residuals.

    Raises:
        HawqError: unknown kind or site, no batches, or a network that cannot be differentiated twice.
    """
    choice("kind", kind, get_args(Curvature))
    if count < 1:
        raise HawqError(f"count is {count}; it is 1 or more.")
    data = BatchSet.of(model, batches, batch_images, shard)
    with isolated_eval(model, seed):
        loss_fn = repeatable(model, loss_fn)
        first, samples = data.batches[0], data.samples[0]
        table = sites or find_sites(model, lambda: loss_fn(model, first), samples)
        context = MeasureContext.of(model, table, loss_fn)
        check_weights(context.layers)
        names = [s.name for s in table]
        requested = names if only is None else list(only)
        for name in requested:
            choice("site", name, names)
        check_float(context)
        separable, show = samples_apart(context, first, samples, batch_images), progress and data.shard.rank == 0
        search = _Search(context, data, separable, kind, rtol, max_steps, seed, show)
        try:
            pairs = search.weights([s.name for s in table.weights if s.name in requested], count)
            pairs |= search.activations([s.name for s in table.activations if s.name in requested])
        except RuntimeError as error:
            if "derivative" in str(error) or "differentiate" in str(error) or "double backward" in str(error):
                raise HawqError(f"Eigenvalues need double backward through the network: {error}") from error
            raise
    return {s.name: pairs[s.name] for s in table if s.name in pairs}


@dataclass
class _Search:
    """Searches of all sites side by side.

    Attributes:
        context: model, loss and sites.
        data: all batches.
        per_sample: site -> whether samples can be told apart there.
        kind: ``ggn`` or ``hessian``.
        rtol: residual to reach.
        max_steps: products a site at the most.
        seed: of the first vectors.
        progress: show a bar.
    """

    context: MeasureContext
    data: BatchSet
    per_sample: Mapping[str, bool]
    kind: Curvature
    rtol: float
    max_steps: int
    seed: int
    progress: bool

    def weights(self, names: list[str], count: int) -> dict[str, Eigenpairs]:
        owner: dict[str, Any] = {
            x.weight: self.context.layers[x.name].weight for x in reversed(self.context.table.layers)
        }
        shapes = {n: (1, owner[n].numel()) for n in names}
        local, samples, shard = self.data.local, self.data.samples, self.data.shard
        total = sum(samples)
        searches: dict[str, list[LobpcgState]] = {n: [] for n in names}
        with ExitStack() as stack:
            graphs = {b: stack.enter_context(self._graph(b, names)) for b in local} if len(local) == 1 else {}

            def apply(vectors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
                out = {n: torch.zeros_like(v) for n, v in vectors.items()}
                for b in local:
                    with nullcontext(graphs[b]) if b in graphs else self._graph(b, names) as graph:
                        for n, v in vectors.items():
                            out[n] += samples[b] / total * graph.product(n, v)
                if shard.all_reduce_sum is not None:
                    flat = shard.sum(torch.cat([v.flatten() for v in out.values()]).cpu())
                    parts = flat.split([v.numel() for v in out.values()])
                    out = {n: p.reshape(v.shape).to(v.device) for (n, v), p in zip(out.items(), parts)}
                return out

            for i in range(count):
                deflated = {n: torch.stack([c.x for c in searches[n]], 1) for n in names} if i else {}
                for n, state in self._run(shapes, apply, deflated, f"Eigenvalue {i + 1}").items():
                    searches[n].append(state)
        return {
            n: Eigenpairs(
                tuple(float(c.value) for c in states),
                tuple(c.x.reshape(owner[n].shape).to(owner[n].dtype) for c in states),
                tuple(float(c.residual) for c in states),
            )
            for n, states in searches.items()
        }

    def activations(self, names: list[str]) -> dict[str, Eigenpairs]:
        if not names:
            return {}
        # samples do not touch each other: every batch is a problem of its own
        table = torch.zeros(3, len(names), dtype=torch.float64)
        for b in self.data.local:
            with self._graph(b, names) as graph:
                shapes = {n: graph.shape(n) for n in names}
                states = self._run(shapes, graph.products, {}, "Activation eigenvalues")
            for i, n in enumerate(names):
                weight = self.data.samples[b] / len(states[n].value)
                table[0, i] += weight * float(states[n].value.sum())
                table[1, i] += weight * float((states[n].residual * states[n].value.abs()).sum())
                table[2, i] += self.data.samples[b]
        table = self.data.shard.sum(table.flatten()).reshape(table.shape)
        mean, error = table[0] / table[2], table[1] / table[2]
        return {
            n: Eigenpairs((float(m),), (), (float(e / m.abs().clamp_min(1e-300)),))
            for n, m, e in zip(names, mean, error)
        }

    def _run(
        self, shapes: Mapping[str, tuple[int, int]], apply: Apply, deflated: Mapping[str, torch.Tensor], what: str
    ) -> dict[str, LobpcgState]:
        device = next(self.context.model.parameters()).device
        states = {}
        for i, (n, shape) in enumerate(shapes.items()):
            generator = torch.Generator().manual_seed(self.seed + i)
            start = torch.randn(shape, generator=generator, dtype=torch.float64).to(device)
            states[n] = LobpcgState(start, deflated.get(n))
        with progress_bar(what, len(states), self.progress) as advance:
            for step in range(self.max_steps):
                active = {n: c for n, c in states.items() if step == 0 or not c.done(self.rtol)}
                advance(len(states) - len(active))
                if not active:
                    break
                products = apply({n: c.next_vectors() for n, c in active.items()})
                for n, c in active.items():
                    c.update(products[n])
        return states

    @contextmanager
    def _graph(self, number: int, sites: Collection[str]) -> Iterator[_Graph]:
        directions: list[torch.Tensor] = []

        def unknown(step: ForwardPass) -> list[torch.Tensor]:
            directions[:] = [torch.zeros_like(v).requires_grad_(True) for v in step.hessian.values]
            return directions

        batch = self.data.batches[number]
        direction = unknown if self.kind == "ggn" else None
        with ExitStack() as stack:
            graph = partial(gradients_of, self.context, batch, self.per_sample, direction, sites=sites)
            gradients = with_copies(self.context.diagnostics.overwritten, lambda: stack.enter_context(graph()))
            yield _Graph(gradients, directions, self.data.samples[number], self.per_sample)


@dataclass
class _Graph:
    """Products with the blocks of one batch, vectors flattened to (rows, elements)."""

    gradients: GradGraph
    directions: list[torch.Tensor]
    samples: int
    per_sample: Mapping[str, bool]

    def shape(self, site: str) -> tuple[int, int]:
        rows = self.samples if self._by_sample(site) else 1
        return rows, sum(p.numel() for p in self.gradients.points[site]) // rows

    def _by_sample(self, site: str) -> bool:
        return self.per_sample[site] and site in self.gradients.forward.network.aliases()

    def products(self, vectors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Site -> product (rows, elements) of its block with its vectors (rows, elements)."""
        return {n: self.product(n, v) for n, v in vectors.items()}

    def product(self, site: str, vector: torch.Tensor) -> torch.Tensor:
        points, rows = self.gradients.points[site], vector.shape[0]
        sizes = [p.numel() // rows for p in points]
        vectors = [v.reshape(p.shape).to(p) for v, p in zip(vector.split(sizes, 1), points)]
        gauss_newton = bool(self.directions)
        out = self._gauss_newton(site, points, vectors) if gauss_newton else self.gradients.product(site, vectors)
        flat = torch.cat([h.reshape(rows, -1).to(torch.float64) for h in out], 1)
        return flat * (self.samples if self._by_sample(site) else 1)  # of the sample's own loss

    def _gauss_newton(self, site: str, points: list[torch.Tensor], vectors: list[torch.Tensor]) -> list[torch.Tensor]:
        pairs = [(g, v) for g, v in zip(self.gradients.gradient[site], vectors) if g is not None]
        if not pairs:
            return [torch.zeros_like(p) for p in points]
        # the gradients are J^T w, linear in w: differentiating <J^T w, v> by w gives J v
        moved = torch.autograd.grad(
            [g for g, _ in pairs], self.directions, [v for _, v in pairs], retain_graph=True, allow_unused=True
        )
        hessian = self.gradients.forward.hessian
        products = hessian([torch.zeros_like(f) if m is None else m.detach() for m, f in zip(moved, hessian.values)])
        gradients = torch.autograd.grad(hessian.edges, points, products, retain_graph=True, allow_unused=True)
        return [torch.zeros_like(p) if h is None else h.detach() for h, p in zip(gradients, points)]
