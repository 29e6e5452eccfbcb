"""How fast traces settle, in images and in random vectors (paper, Fig. 5 and 8), and what they say beside eigenvalues
(Fig. 6).
"""  # noqa: D205

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from hawq_lightning.report._figure import (
    BLUE,
    GREEN,
    INK,
    ORANGE,
    PURPLE,
    SOFT,
    ReportFigure,
    Tooltip,
    canvas,
    log_scale,
)
from hawq_lightning.report._site_figures import KINDS
from hawq_lightning.sensitivity import Sensitivity

_COLOURS = (BLUE, ORANGE, GREEN, PURPLE)
_STYLES = ("-", "--", "-.", ":")


def chosen_sites(sensitivity: Sensitivity, kind: str, most: int = 4) -> list[str]:
    """A few sites from the largest mean trace to the smallest."""
    ranked = sorted((r for r in sensitivity if r.kind == kind and r.trace > 0), key=lambda r: -r.mean_trace)
    if len(ranked) <= most:
        return [r.name for r in ranked]
    return [ranked[round(i * (len(ranked) - 1) / (most - 1))].name for i in range(most)]


def draw_images(sensitivity: Sensitivity, sites: Sequence[str] | None = None) -> ReportFigure | None:
    """Relative running mean of some traces over the images, with two standard errors of the data (Fig. 5, left)."""
    names = list(sites or chosen_sites(sensitivity, "weight"))
    names = [n for n in names if sensitivity.row_unit.get(n) == "image" and len(sensitivity.rows.get(n, ())) > 2]
    series = {n: np.asarray(sensitivity.rows[n], dtype=float) for n in names}
    return _running(
        series, "convergence_images", "How many images are enough", "images",
        "Each line is the trace over the first n images as a share of the trace over all; the band is two standard "
        "errors of the choice of images. It narrows as the square root of n.",
    )  # fmt: skip


def draw_steps(
    steps: Mapping[str, Sequence[float]], sites: Sequence[str] | None = None, *, kind: str = "weight"
) -> ReportFigure | None:
    """Relative running mean over the random vectors of Hutchinson's method, with two standard errors (Fig. 5, 8)."""
    names = [n for n in (sites or steps) if n in steps][: len(_COLOURS)]
    series = {n: np.asarray(steps[n], dtype=float) for n in names}
    what = KINDS[kind][0]
    return _running(
        series, f"convergence_steps_{what}", f"How many random vectors are enough: {what}", "random vectors",
        "Each line is the mean over the first m random vectors of Hutchinson's method as a share of the mean over all; "
        "the band is two standard errors.",
    )  # fmt: skip


def _running(series: Mapping[str, np.ndarray], name: str, title: str, unit: str, caption: str) -> ReportFigure | None:
    positive = {n: x for n, x in series.items() if len(x) > 2 and x.mean() > 0}
    if not positive:
        return None
    rows: list[list[object]] = []
    ends = []
    with canvas(1, 3.8) as (figure, (ax,)):
        for (site, x), colour, style in zip(positive.items(), _COLOURS, _STYLES):
            n = np.arange(1, len(x) + 1)
            mean = np.cumsum(x) / n
            spread = np.cumsum(x * x) / n - mean**2
            error = np.sqrt(np.maximum(spread, 0) / np.maximum(n - 1, 1))
            share, band = mean / mean[-1], 2 * error / mean[-1]
            ax.fill_between(n[1:], (share - band)[1:], (share + band)[1:], color=colour, alpha=0.15, linewidth=0)
            ax.plot(n, share, style, color=colour, label=f"{site} ({mean[-1]:.3g})")
            ends.append(f"{site} to ±{band[-1]:.0%}")
            rows += [[site, int(i), float(f"{m:.6g}"), float(f"{e:.6g}")] for i, m, e in zip(n, mean, error)]
        ax.axhline(1.0, color=SOFT, linewidth=0.8)
        ax.set_ylim(0, 2.2)
        ax.set_xlabel(unit)
        ax.set_ylabel("share of the final trace")
        ax.legend(fontsize=9, ncols=2, labelcolor=INK)
        alt = f"Running means over {len(next(iter(positive.values())))} {unit}; two standard errors at the end: "
        return ReportFigure(
            name, title, alt + ", ".join(ends) + ".", caption, figure, ["site", unit, "mean", "stderr"], rows
        )


def draw_eigenvalues(sensitivity: Sensitivity, eigenvalues: Mapping[str, float]) -> ReportFigure | None:
    """Mean trace against top eigenvalue of every weight (Fig. 6): the order that HAWQ used, and this one."""
    records = [r for r in sensitivity if r.kind == "weight" and r.trace > 0 and eigenvalues.get(r.name, 0.0) > 0]
    if len(records) < 2:
        return None
    x = np.array([eigenvalues[r.name] for r in records])
    y = np.array([r.mean_trace for r in records])
    agree = _rank_correlation(x, y)
    with canvas(1, 4.2) as (figure, (ax,)):
        ax.plot(x, y, "o", color=BLUE)
        log_scale(ax, "x", "y")
        ax.set_xlabel("top eigenvalue")
        ax.set_ylabel("mean trace")
        tooltips = [
            Tooltip(ax, a, b, f"{r.name}\ntop eigenvalue {a:.3g}\nmean trace {b:.3g}") for r, a, b in zip(records, x, y)
        ]
        for i in {int(x.argmax()), int(y.argmax()), int(x.argmin()), int(y.argmin())}:
            ax.annotate(records[i].name, (x[i], y[i]), fontsize=9, color=INK, xytext=(5, 5), textcoords="offset points")
    return ReportFigure(
        "eigenvalues",
        "Mean trace against top eigenvalue",
        f"{len(records)} weights; the two orders have a rank correlation of {agree:.2f}.",
        "The top eigenvalue sees one direction of a layer, the trace all of them. Where the points are far from one "
        "rising line, the two would give a layer different bits.",
        figure,
        ["site", "top_eigenvalue", "mean_trace", "trace"],
        [[r.name, float(f"{a:.6g}"), float(f"{b:.6g}"), float(f"{r.trace:.6g}")] for r, a, b in zip(records, x, y)],
        tooltips,
    )


def _rank_correlation(x: np.ndarray, y: np.ndarray) -> float:
    return float(np.corrcoef(x.argsort().argsort(), y.argsort().argsort())[0, 1])
