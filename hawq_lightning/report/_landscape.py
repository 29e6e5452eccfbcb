"""The loss around a minimum along two eigenvectors of some layers (paper, Fig. 2 and 7)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from hawq_lightning.report._figure import GRID, INK, SOFT, ReportFigure, canvas
from hawq_lightning.report._run import Run

Grid = Sequence[Sequence[float]]


def draw_landscapes(
    grids: Mapping[str, Grid], offsets: Sequence[float], eigenvalues: Mapping[str, Sequence[float]]
) -> ReportFigure | None:
    """Loss surfaces of several layers over the same offsets and the same heights, so that they compare.

    Args:
        grids: weight site -> loss[i][j] at ``offsets[i]`` along its first eigenvector, ``offsets[j]`` along the second.
        offsets: in units of the weight.
        eigenvalues: site -> the two eigenvalues.
    """
    if not grids:
        return None
    a = np.asarray(offsets, dtype=float)
    tables = {n: np.asarray(g, dtype=float) for n, g in grids.items()}
    low, high = min(float(t.min()) for t in tables.values()), max(float(t.max()) for t in tables.values())
    with canvas(1, 3.9) as (figure, (first,)):
        first.remove()
        _surfaces(figure, tables, a, low, high, eigenvalues)
    rises = {n: float(t.max() - t.min()) for n, t in tables.items()}
    return ReportFigure(
        "landscape",
        "The loss around the trained weights",
        "Loss surfaces over two eigenvectors; the loss rises by "
        + ", ".join(f"{rise:.3g} at {n}" for n, rise in rises.items())
        + f" within ±{a.max():.3g}.",
        "The layer's weight is moved along the two eigenvectors of its Hessian block with the largest eigenvalues. All "
        "surfaces have the same axes: what is steep here loses most by the same disturbance, and deserves more bits.",
        figure,
        ["site", "first", "second", "loss", "eigenvalue_1", "eigenvalue_2"],
        [
            [n, float(f"{a[i]:.6g}"), float(f"{a[j]:.6g}"), float(f"{t[i, j]:.6g}"), *_two(eigenvalues.get(n, ()))]
            for n, t in tables.items()
            for i in range(len(a))
            for j in range(len(a))
        ],
    )


def draw_landscape(run: Run) -> ReportFigure | None:
    """The surfaces that an earlier measurement left in the folder (``paper_figures=true``)."""
    landscape = run.landscape
    return draw_landscapes(landscape.grids, landscape.offsets, landscape.eigenvalues) if landscape else None


def _two(values: Sequence[float]) -> list[float | str]:
    return [float(f"{v:.6g}") for v in values[:2]] + [""] * (2 - min(2, len(values)))


def _surfaces(
    figure: Figure,
    tables: Mapping[str, np.ndarray],
    a: np.ndarray,
    low: float,
    high: float,
    eigenvalues: Mapping[str, Sequence[float]],
) -> None:
    scale = Normalize(low, high)
    axes = []
    for i, (name, t) in enumerate(tables.items()):
        ax = figure.add_subplot(1, len(tables), i + 1, projection="3d")
        axes.append(ax)
        x, y = np.meshgrid(a, a, indexing="ij")
        ax.plot_surface(x, y, t, cmap="viridis", norm=scale, linewidth=0, antialiased=True)
        ax.set_zlim(low, high)
        values = ", ".join(f"{v:.3g}" for v in eigenvalues.get(name, ())[:2])
        ax.set_title(name.removesuffix(".weight") + (f"\neigenvalues {values}" if values else ""), fontsize=10)
        ax.tick_params(labelsize=7, colors=INK)
        for axis in (ax.xaxis, ax.yaxis, ax.zaxis):
            axis.set_pane_color((0, 0, 0, 0))  # the page may be dark
            axis.line.set_color(SOFT)
            axis._axinfo["grid"]["color"] = GRID
    figure.colorbar(ScalarMappable(scale, "viridis"), ax=axes, shrink=0.6, label="loss")
