"""What figures.py draws beside the report's own figures: traces by block, the trade-off, traces beside eigenvalues."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from scipy.stats import spearmanr

from hawq_lightning.report import BLUE, GREEN, ORANGE, SOFT, ReportFigure, canvas, log_scale

PURPLE, GREY = "#7b5ea7", "#b8c0c8"
MOST_NAMES = 40


def rank_correlation(both: Mapping[str, tuple[float, float]]) -> float:
    """Spearman's."""
    return float(spearmanr(*zip(*both.values())).statistic)


def draw_traces(mean: Mapping[str, float], name: str) -> ReportFigure:
    """Average trace of every weight in network order, on a log scale."""
    with canvas(1, 3.8) as (figure, (ax,)):
        ax.plot(range(len(mean)), list(mean.values()), "o-", color=BLUE, markersize=5, linewidth=1.2)
        log_scale(ax, "y")
        ax.set_ylabel("average trace", color=SOFT)
        _name_blocks(ax, list(mean))
    return ReportFigure(
        name, "Average trace by block", f"Average Hessian trace of {len(mean)} weights in network order, log scale.",
        "Each point is a weight, from the input to the output.", figure, ["block", "average_trace"],
        [[n, float(f"{v:.6g}")] for n, v in mean.items()],
    )  # fmt: skip


def draw_side_by_side(both: Mapping[str, tuple[float, float]]) -> ReportFigure:
    """Average trace and top eigenvalue by block, each as a share of its largest."""
    most = [max(x) for x in zip(*both.values())]
    with canvas(1, 3.8) as (figure, (ax,)):
        for i, (label, colour, marker) in enumerate((("average trace", BLUE, "o"), ("top eigenvalue", ORANGE, "s"))):
            shares = [v[i] / most[i] for v in both.values()]
            ax.plot(range(len(both)), shares, f"{marker}-", color=colour, markersize=5, linewidth=1.2, label=label)
        log_scale(ax, "y")
        ax.set_ylabel("share of the largest", color=SOFT)
        ax.legend(loc="lower left")
        _name_blocks(ax, list(both))
    return ReportFigure(
        "figure6", "Average trace beside top eigenvalue",
        f"Average trace and top eigenvalue of {len(both)} weights in network order, each over its largest, log scale.",
        "Where the lines part, the two metrics would give a block another rank, and so other bits.", figure,
        ["block", "average_trace", "top_eigenvalue"],
        [[n, float(f"{a:.6g}"), float(f"{b:.6g}")] for n, (a, b) in both.items()],
    )  # fmt: skip


def draw_set_b(rows: Sequence[Mapping[str, Any]]) -> ReportFigure:
    """Settings of set B, the frontier of all settings, uniform bits and some plans: Ω against kilobytes.

    Args:
        rows: of :func:`hawq_lightning.selection.tradeoff`.
    """
    floor = min(float(r["omega"]) for r in rows if float(r["omega"]) > 0)
    marks = {"HAWQ": ("^", GREEN), "Direct": ("s", PURPLE), "HAWQ-V2": ("D", ORANGE)}
    with canvas(1, 4.6) as (figure, (ax,)):
        for series, style, colour, size in (
            ("set B", ".", GREY, 4),
            ("frontier", "-", BLUE, 1),
            ("uniform", "x", SOFT, 7),
        ):
            part = [r for r in rows if r["series"] == series]
            label = {"set B": "settings that follow the traces' order", "uniform": "the same bits everywhere"}.get(
                series
            )
            ax.plot(
                [float(r["cost"]) / 1024 for r in part], [max(float(r["omega"]), floor) for r in part], style,
                color=colour, markersize=size, label=label or "least Ω of all settings",
            )  # fmt: skip
        for r in (r for r in rows if r["series"] == "plan"):
            marker, colour = marks[str(r["label"])]
            ax.plot(
                float(r["cost"]) / 1024, float(r["omega"]), marker, color=colour, markersize=9, label=str(r["label"])
            )
        log_scale(ax, "y")
        ax.set_xlabel("size of the weights, KiB", color=SOFT)
        ax.set_ylabel("Ω", color=SOFT)
        ax.legend(loc="upper right")
    count = sum(r["series"] == "set B" for r in rows)
    return ReportFigure(
        "figure4", "Size against Ω", f"Ω against the size of the weights: {count} settings of set B, and the frontier.",
        f"Dots: {count} members of the paper's set B, drawn at random.", figure, ["series", "label", "bytes", "omega"],
        [[r["series"], r["label"], f"{float(r['cost']):g}", f"{float(r['omega']):.6g}"] for r in rows],
    )  # fmt: skip


def _name_blocks(ax: Any, names: Sequence[str]) -> None:
    """Names below the axis where they are few, numbers where they are many."""
    if len(names) <= MOST_NAMES:
        ax.set_xticks(range(len(names)), names, rotation=60, ha="right", fontsize=8, rotation_mode="anchor")
    else:
        ax.set_xlabel("block", color=SOFT)
