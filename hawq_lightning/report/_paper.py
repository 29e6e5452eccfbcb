"""The paper's figures 2, 5, 6, 7 and 8 of any network, from its own traces, eigenvectors and losses."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import nn

from hawq_lightning._progress import progress_bar
from hawq_lightning._site_table import SiteTable
from hawq_lightning._sites import quantizable_layers
from hawq_lightning._types import Batch, LossFn
from hawq_lightning.report._convergence import chosen_sites, draw_eigenvalues, draw_images, draw_steps
from hawq_lightning.report._figure import ReportFigure
from hawq_lightning.report._landscape import draw_landscapes
from hawq_lightning.sensitivity import Sensitivity, landscape, top_eigenpairs, trace_history


def paper_figures(
    folder: str | Path,
    model: nn.Module,
    batches: Sequence[Batch],
    loss_fn: LossFn,
    sensitivity: Sensitivity,
    sites: SiteTable,
    *,
    steps: int = 30,
    points: int = 15,
    seed: int = 0,
    progress: bool = False,
) -> list[str]:
    """Write ``<name>.png`` and ``<name>.csv`` of every figure that the network allows.

    Args:
        folder: where to.
        model: the float network, left as it was.
        batches: images to work on; the first batch for steps, eigenvectors and landscapes.
        loss_fn: ``loss_fn(model, batch) -> scalar``.
        sensitivity: its traces.
        sites: its sites.
        steps: random vectors of Hutchinson's method (Fig. 5 right, 8).
        points: of a landscape's grid in each direction.
        seed: of all draws.
        progress: show a bar.

    Returns:
        names of the figures written.
    """
    few = batches[:1]
    with progress_bar("Figures of the paper", 4, progress) as advance:
        drawings: list[ReportFigure | None] = [draw_images(sensitivity)]
        series = trace_history(model, few, loss_fn, steps=steps, sites=sites, seed=seed)
        drawings += [draw_steps(series, chosen_sites(sensitivity, k), kind=k) for k in ("weight", "activation")]
        advance(1)
        weights = [s.name for s in sites.weights]
        tops = top_eigenpairs(model, few, loss_fn, sites=sites, only=weights, rtol=0.05, seed=seed)
        drawings.append(draw_eigenvalues(sensitivity, {n: e.values[0] for n, e in tops.items()}))
        advance(2)
        ends = chosen_sites(sensitivity, "weight", 2)
        pairs = top_eigenpairs(model, few, loss_fn, sites=sites, only=ends, count=2, rtol=0.05, seed=seed)
        advance(3)
        sharpest = max((e.values[0] for e in pairs.values()), default=0.0)
        if sharpest > 0 and points > 1:
            span = (2 / sharpest) ** 0.5  # where the sharpest parabola has risen by one
            offsets = [span * (2 * i / (points - 1) - 1) for i in range(points)]
            layers, _ = quantizable_layers(model)
            weights_of = {x.weight: layers[x.name].weight for x in reversed(sites.layers)}
            grids = {
                n: landscape(model, few, loss_fn, weights_of[n], (e.vectors[0], e.vectors[1]), offsets)
                for n, e in pairs.items()
            }
            drawings.append(draw_landscapes(grids, offsets, {n: e.values for n, e in pairs.items()}))
        advance(4)
    figures = [d for d in drawings if d is not None]
    for d in figures:
        d.save(Path(folder))
    return [d.name for d in figures]
