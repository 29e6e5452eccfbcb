"""Top eigenvalues and eigenvectors of each site's Hessian block: HAWQ's first metric, Table 5, loss landscapes.

Locally optimal conjugate gradients (Knyazev, SIAM J. Sci. Comput. 23, 2001), one product a step as in power iteration
but with Lanczos's speed and the memory of six vectors. All sites advance together, each on its own block.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hawq_lightning._batches import batch_images
from hawq_lightning._errors import HawqError, nearest
from hawq_lightning._progress import Bar, progress_bar
from hawq_lightning._site_table import SiteTable
from hawq_lightning._sites import Patterns, find_sites, quantizable_layers
from hawq_lightning.sensitivity._context import ForwardPass, LossFn, MeasureContext, check_weights
from hawq_lightning.sensitivity._double_backward import GradGraph, slopes_of
from hawq_lightning.sensitivity._ggn import independent_images
from hawq_lightning.sensitivity._isolate import isolated_eval, to_device
from hawq_lightning.sensitivity._microbatch import ImagesOf
from hawq_lightning.sensitivity._trace_loop import ProcessShard

KINDS = ("ggn", "hessian")


@dataclass(frozen=True)
class Eigenpairs:
    """The largest eigenvalues of one site's block, in falling order.

    Attributes:
        values: of the mean loss for weights; for activations the mean over images of each image's own.
        vectors: of unit norm and the weight's shape; empty for activations, which have one an image.
        residuals: ``|H v - value v| / |value|``: an eigenvalue lies within this share.
    """

    values: tuple[float, ...]
    vectors: tuple[torch.Tensor, ...]
    residuals: tuple[float, ...]


def top_eigenvalues(model: nn.Module, batches: Iterable[Any], loss_fn: LossFn, **kwargs: Any) -> dict[str, float]:
    """Site -> largest eigenvalue of its Hessian block; keywords as in :func:`top_eigenpairs`."""
    return {n: e.values[0] for n, e in top_eigenpairs(model, batches, loss_fn, **kwargs).items()}


def top_eigenpairs(
    model: nn.Module,
    batches: Iterable[Any],
    loss_fn: LossFn,
    *,
    count: int = 1,
    kind: str = "ggn",
    sites: SiteTable | None = None,
    only: Collection[str] | None = None,
    include: Patterns = None,
    exclude: Patterns = None,
    rtol: float = 0.02,
    max_steps: int = 100,
    seed: int = 0,
    progress: bool | Bar = False,
    batch_size_fn: ImagesOf = batch_images,
    share: ProcessShard | None = None,
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
        include: glob on layer names, layer type, or ``f(name, module) -> bool``.
        exclude: likewise.
        rtol: stop at this residual, as a share of the eigenvalue.
        max_steps: products a site at the most.
        seed: of the first vectors.
        progress: show a bar.
        batch_size_fn: number of images in a batch.
        share: for several processes.

    Returns:
        site name -> eigenvalues, eigenvectors, residuals.

    Raises:
        HawqError: unknown kind or site, no batches, or a network that cannot be differentiated twice.
    """
    if kind not in KINDS:
        raise HawqError(f"Unknown kind {kind!r}; use 'ggn' or 'hessian'.{nearest(str(kind), KINDS)}")
    if count < 1:
        raise HawqError(f"count is {count}; at least one eigenvalue must be asked for.")
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    kept = [to_device(b, device) for b in batches]
    if not kept:
        raise HawqError("No batches to measure on: the dataloader or iterable is empty.")
    images = [batch_size_fn(b) for b in kept]
    share = share or ProcessShard()
    shown = nullcontext(progress) if isinstance(progress, Bar) else progress_bar(progress and share.rank == 0)
    with isolated_eval(model, seed), shown as bar:
        layers, _ = quantizable_layers(model, include, exclude)
        check_weights(layers)
        table = sites or find_sites(model, lambda: loss_fn(model, kept[0]), images[0], include, exclude)
        wanted = [s.name for s in table] if only is None else list(only)
        for name in wanted:
            if name not in {s.name for s in table}:
                raise HawqError(f"There is no site {name!r}.{nearest(name, [s.name for s in table])}")
        setting = MeasureContext(model, {x.name: layers[x.name] for x in table.layers}, table, loss_fn)
        per_image = independent_images(setting, kept[0], images[0])
        work = _Work(setting, kept, images, per_image, kind, share, rtol, max_steps, seed, bar)
        try:
            found = work.weights([s.name for s in table.weights if s.name in wanted], count)
            found |= work.activations([s.name for s in table.activations if s.name in wanted])
        except RuntimeError as error:
            if "derivative" in str(error) or "differentiate" in str(error) or "double backward" in str(error):
                raise HawqError(f"Eigenvalues need double backward through the network: {error}") from error
            raise
    return {s.name: found[s.name] for s in table if s.name in found}


@dataclass
class _Work:
    setting: MeasureContext
    kept: Sequence[Any]
    images: Sequence[int]
    per_image: Mapping[str, bool]
    kind: str
    share: ProcessShard
    rtol: float
    max_steps: int
    seed: int
    bar: Bar

    def weights(self, names: list[str], count: int) -> dict[str, Eigenpairs]:
        owner: dict[str, Any] = {
            x.weight: self.setting.layers[x.name].weight for x in reversed(self.setting.table.layers)
        }
        shapes = {n: (1, owner[n].numel()) for n in names}
        mine = range(self.share.rank, len(self.kept), self.share.world)
        total = sum(self.images)
        found: dict[str, list[_LobpcgState]] = {n: [] for n in names}
        with ExitStack() as stack:
            graphs = {b: stack.enter_context(self._graph(b, names)) for b in mine} if len(mine) == 1 else {}

            def apply(vectors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
                out = {n: torch.zeros_like(v) for n, v in vectors.items()}
                for b in mine:
                    with nullcontext(graphs[b]) if b in graphs else self._graph(b, names) as graph:
                        for n, v in vectors.items():
                            out[n] += self.images[b] / total * graph.product(n, v)
                if self.share.all_reduce_sum is not None:
                    flat = self.share.all_reduce_sum(torch.cat([v.flatten() for v in out.values()]).cpu())
                    parts = flat.split([v.numel() for v in out.values()])
                    out = {n: p.reshape(v.shape).to(v.device) for (n, v), p in zip(out.items(), parts)}
                return out

            for i in range(count):
                known = {n: torch.stack([c.x for c in found[n]], 1) for n in names} if i else {}
                for n, climb in self._climb(shapes, apply, known, f"Eigenvalue {i + 1}").items():
                    found[n].append(climb)
        return {
            n: Eigenpairs(
                tuple(float(c.value) for c in climbs),
                tuple(c.x.reshape(owner[n].shape).to(owner[n].dtype) for c in climbs),
                tuple(float(c.residual) for c in climbs),
            )
            for n, climbs in found.items()
        }

    def activations(self, names: list[str]) -> dict[str, Eigenpairs]:
        if not names:
            return {}
        # images do not touch each other: every batch is a problem of its own
        table = torch.zeros(3, len(names), dtype=torch.float64)
        for b in range(self.share.rank, len(self.kept), self.share.world):
            with self._graph(b, names) as graph:
                shapes = {n: graph.shape(n) for n in names}
                climbs = self._climb(
                    shapes,
                    lambda vs, g=graph: {n: g.product(n, v) for n, v in vs.items()},
                    {},
                    "Activation eigenvalues",
                )
            for i, n in enumerate(names):
                weight = self.images[b] / len(climbs[n].value)
                table[0, i] += weight * float(climbs[n].value.sum())
                table[1, i] += weight * float((climbs[n].residual * climbs[n].value.abs()).sum())
                table[2, i] += self.images[b]
        if self.share.all_reduce_sum is not None:
            table = self.share.all_reduce_sum(table.flatten()).reshape(table.shape)
        mean, error = table[0] / table[2], table[1] / table[2]
        return {
            n: Eigenpairs((float(m),), (), (float(e / m.abs().clamp_min(1e-300)),))
            for n, m, e in zip(names, mean, error)
        }

    def _climb(
        self, shapes: Mapping[str, tuple[int, int]], apply: Any, known: Mapping[str, torch.Tensor], what: str
    ) -> dict[str, _LobpcgState]:
        device = next(self.setting.model.parameters()).device
        climbs = {}
        for i, (n, shape) in enumerate(shapes.items()):
            generator = torch.Generator().manual_seed(self.seed + i)
            start = torch.randn(shape, generator=generator, dtype=torch.float64).to(device)
            climbs[n] = _LobpcgState(start, known.get(n))
        task = self.bar.begin(what, len(climbs))
        for step in range(self.max_steps):
            active = {n: c for n, c in climbs.items() if step == 0 or not c.done(self.rtol)}
            self.bar.advance(task, len(climbs) - len(active))
            if not active:
                break
            products = apply({n: c.question() for n, c in active.items()})
            for n, c in active.items():
                c.answer(products[n])
        return climbs

    @contextmanager
    def _graph(self, number: int, sites: Collection[str]) -> Iterator[_Graph]:
        directions: list[torch.Tensor] = []

        def unknown(step: ForwardPass) -> list[torch.Tensor]:
            directions[:] = [torch.zeros_like(v).requires_grad_(True) for v in step.hessian.values]
            return directions

        batch = self.kept[number]
        direction = unknown if self.kind == "ggn" else None
        with slopes_of(self.setting, batch, self.per_image, direction, sites=sites) as slopes:
            yield _Graph(slopes, directions, self.images[number], self.per_image)


@dataclass
class _Graph:
    """Products with the blocks of one batch, vectors flattened to (rows, elements)."""

    slopes: GradGraph
    directions: list[torch.Tensor]
    images: int
    per_image: Mapping[str, bool]

    def shape(self, site: str) -> tuple[int, int]:
        rows = self.images if self._by_image(site) else 1
        return rows, sum(p.numel() for p in self.slopes.points[site]) // rows

    def _by_image(self, site: str) -> bool:
        return self.per_image[site] and site in self.slopes.step.network.aliases()

    def product(self, site: str, vector: torch.Tensor) -> torch.Tensor:
        points, rows = self.slopes.points[site], vector.shape[0]
        sizes = [p.numel() // rows for p in points]
        vectors = [v.reshape(p.shape).to(p) for v, p in zip(vector.split(sizes, 1), points)]
        gauss_newton = bool(self.directions)
        out = self._gauss_newton(site, points, vectors) if gauss_newton else self.slopes.product(site, vectors)
        flat = torch.cat([h.reshape(rows, -1).to(torch.float64) for h in out], 1)
        return flat * (self.images if self._by_image(site) else 1)  # of the image's own loss

    def _gauss_newton(self, site: str, points: list[torch.Tensor], vectors: list[torch.Tensor]) -> list[torch.Tensor]:
        pairs = [(g, v) for g, v in zip(self.slopes.gradient[site], vectors) if g is not None]
        if not pairs:
            return [torch.zeros_like(p) for p in points]
        # the gradients are J^T w, linear in w: differentiating <J^T w, v> by w gives J v
        moved = torch.autograd.grad(
            [g for g, _ in pairs], self.directions, [v for _, v in pairs], retain_graph=True, allow_unused=True
        )
        hessian = self.slopes.step.hessian
        curved = hessian([torch.zeros_like(f) if m is None else m.detach() for m, f in zip(moved, hessian.values)])
        found = torch.autograd.grad(hessian.edges, points, curved, retain_graph=True, allow_unused=True)  # type: ignore[arg-type]
        return [torch.zeros_like(p) if h is None else h.detach() for h, p in zip(found, points)]


class _LobpcgState:
    """The search for the top eigenvector of several rows at once, fed with one product a step.

    Args:
        start: first vectors (rows, elements).
        known: vectors to stay orthogonal to (rows, number, elements).
    """

    def __init__(self, start: torch.Tensor, known: torch.Tensor | None) -> None:
        self._known = known
        self.x = _unit(self._free(start))
        self.ax = torch.zeros_like(start)
        self.p, self.ap = torch.zeros_like(start), torch.zeros_like(start)
        self.value = torch.zeros(start.shape[0], dtype=torch.float64, device=start.device)
        self.residual = torch.full_like(self.value, float("inf"))
        self._step = 0

    def _free(self, v: torch.Tensor) -> torch.Tensor:
        if self._known is None:
            return v
        return v - torch.einsum("rk,rke->re", torch.einsum("rke,re->rk", self._known, v), self._known)

    def done(self, rtol: float) -> bool:
        return bool((self.residual <= rtol).all())

    def question(self) -> torch.Tensor:
        """The vectors whose product is needed next."""
        if self._step == 0:
            return self.x
        r = self._free(self.ax - self.value[:, None] * self.x)
        for _ in range(2):  # twice is enough
            r = r - _dot(self.x, r) * self.x - _dot(self.p, r) * self.p
            r = _unit(r)
        self._r = self._free(r)
        return self._r

    def answer(self, product: torch.Tensor) -> None:
        """Take the product in and find the best vector of what is spanned by now."""
        self._step += 1
        if self._step == 1:
            self.ax = product
        else:
            basis = torch.stack([self.x, self._r, self.p], 1)
            image = torch.stack([self.ax, product, self.ap], 1)
            small = torch.einsum("rie,rje->rij", basis, image)
            small = (small + small.mT) / 2
            empty = basis.square().sum(-1) < 0.5
            lowest = -1e3 * small.abs().amax((1, 2), keepdim=True).clamp_min(1e-300)
            small = torch.where(torch.diag_embed(empty), lowest, small)
            top = torch.linalg.eigh(small).eigenvectors[..., -1]
            self.x = torch.einsum("ri,rie->re", top, basis)
            self.ax = torch.einsum("ri,rie->re", top, image)
            p = torch.einsum("ri,rie->re", top[:, 1:], basis[:, 1:])
            ap = torch.einsum("ri,rie->re", top[:, 1:], image[:, 1:])
            overlap = _dot(self.x, p)
            p, ap = p - overlap * self.x, ap - overlap * self.ax
            norm = p.norm(dim=1, keepdim=True)
            small_step = norm < 1e-12
            self.p = torch.where(small_step, 0.0, p / norm.clamp_min(1e-300))
            self.ap = torch.where(small_step, 0.0, ap / norm.clamp_min(1e-300))
        self.value = _dot(self.x, self.ax)[:, 0]
        rest = self._free(self.ax - self.value[:, None] * self.x).norm(dim=1)
        self.residual = torch.where(rest == 0, 0.0, rest / self.value.abs().clamp_min(1e-300))


def _dot(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (a * b).sum(1, keepdim=True)


def _unit(v: torch.Tensor) -> torch.Tensor:
    return v / v.norm(dim=1, keepdim=True).clamp_min(1e-300)
