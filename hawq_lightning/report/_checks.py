"""Figures that test the claim: predicted against measured loss change, and accuracy through fine-tuning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.ticker import MaxNLocator, PercentFormatter
from scipy.stats import spearmanr

from hawq_lightning.report._figure import BLUE, GREEN, ORANGE, SOFT, ReportFigure, Tooltip, canvas, log_scale
from hawq_lightning.report._run import LossCheck, Run, finite
from hawq_lightning.report._site_figures import KINDS
from hawq_lightning.report._text import falls, score

_PREFERRED = ("val_acc", "val/acc", "val_accuracy", "accuracy", "val_map", "val/map", "map", "acc", "val_loss", "loss")


_LEVELS = {  # dashed lines
    "float": ("float", GREEN, (0, (6, 3))),
    "quantized": ("quantized, before fine-tuning", ORANGE, (0, (2, 2))),
}


def draw_loss_check(run: Run) -> ReportFigure | None:
    """What is predicted against what is measured, each site and width by itself, log-log.

    Half Omega against the distance to the float network (in old files against the change of the loss); where quadratic
    forms were measured, half of these, and half Omega beside.
    """
    rows = list(run.loss_check)
    drawn = [r for r in rows if r.expected > 0 and r.outcome > 0]
    forms = any(r.q is not None for r in rows)
    of, what = "½Q" if forms else "½Ω", "rise of the loss"
    if any(r.kl is not None for r in rows):
        what = "KL to the float network"
    if len(drawn) < 2:
        return None
    ranks = rank_correlations(rows)
    further = [c for c in ("q", "kl") if any(getattr(r, c) is not None for r in rows)]
    tooltips = []
    with canvas(1, 5.2) as (figure, axes):
        ax = axes[0]
        low = min(min(r.expected, r.outcome) for r in drawn) / 2
        high = max(max(r.expected, r.outcome) for r in drawn) * 2
        ax.plot([low, high], [low, high], "--", color=SOFT, linewidth=1, zorder=1, label="as predicted")
        beside = [r for r in drawn if r.q is not None and r.predicted > 0]
        if beside:
            ax.plot(
                [r.predicted for r in beside], [r.outcome for r in beside], "x", color=SOFT, markersize=5, alpha=0.6,
                zorder=1, label="½Ω in its place",
            )  # fmt: skip
        for kind, (label, colour, marker) in KINDS.items():
            part = [r for r in drawn if r.kind == kind]
            if part:
                text = f"{label}, rank correlation {ranks[kind]:.2f}" if kind in ranks else label
                xs, ys = [r.expected for r in part], [r.outcome for r in part]
                ax.plot(xs, ys, marker, color=colour, markersize=6, alpha=0.8, label=text, zorder=2)
        tooltips = [
            Tooltip(
                ax,
                r.expected,
                r.outcome,
                f"{r.site}\n{r.bits} bits\npredicted {r.expected:.3g}\nmeasured {r.outcome:.3g}",
            )
            for r in drawn
        ]
        log_scale(ax, "x", "y")
        ax.set_xlabel(f"predicted {what}, {of}", color=SOFT)
        ax.set_ylabel(f"measured {what}", color=SOFT)
        ax.legend(loc="upper left")
    hidden = len(rows) - len(drawn)
    correlations = ", ".join(f"{v:.2f} for {KINDS[k][0] if k in KINDS else 'all'}" for k, v in ranks.items())
    return ReportFigure(
        "loss_check",
        "Does the prediction hold?",
        f"Predicted against measured {what} for {len(drawn)} pairs of site and width, log-log. "
        f"Spearman's rank correlation: {correlations or 'not defined'}.",
        f"Every site quantized alone, at every width, before any fine-tuning. Spearman's rank correlation over all "
        f"{len(rows)}: {correlations or 'not defined'}."
        + (f" {hidden} with a measured change at or below zero cannot be drawn on a log scale." if hidden else ""),
        figure,
        ["site", "kind", "bits", "predicted", "measured", *further],
        [[r.site, r.kind, r.bits, f"{r.predicted:.6g}", f"{r.measured:.6g}", *_cells(r, further)] for r in rows],
        tooltips,
    )


def _cells(row: LossCheck, columns: Sequence[str]) -> list[str]:
    values = {"q": row.q, "kl": row.kl}
    return ["" if values[c] is None else f"{values[c]:.6g}" for c in columns]


def rank_correlations(rows: Sequence[LossCheck]) -> dict[str, float]:
    """Spearman's rank correlation of prediction and measurement, for all sites and for each kind."""
    correlations = {}
    for kind in ("all", *KINDS):
        part = [r for r in rows if kind in ("all", r.kind)]
        if len({r.expected for r in part}) > 1 and len({r.outcome for r in part}) > 1:
            correlations[kind] = float(spearmanr([r.expected for r in part], [r.outcome for r in part]).statistic)
    return correlations


def draw_training(run: Run) -> ReportFigure | None:
    """The validation metric by epoch of fine-tuning, between the levels before and after quantizing."""
    history = run.metrics.get("history")
    metric, stages = run.metric
    key, points = next(((k, p) for k in (metric, *_PREFERRED) if (p := _points(history, k))), ("", []))
    if not points:
        return None
    loss = falls(key)
    levels = {} if loss and key != metric else {s: stages[s] for s in _LEVELS if s in stages}
    with canvas(1, 3.6) as (figure, axes):
        ax = axes[0]
        ax.plot(*zip(*points), "o-", color=BLUE, markersize=6, label=key, zorder=3)
        for stage, level in levels.items():
            text, colour, dash = _LEVELS[stage]
            ax.axhline(level, color=colour, linestyle=dash, linewidth=1.6, label=text, zorder=2)
        ax.set_xlabel("epoch of fine-tuning", color=SOFT)
        ax.set_ylabel(key, color=SOFT)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        if len(points) == 1:
            ax.set_xlim(points[0][0] - 1, points[0][0] + 1)
        ax.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, borderaxespad=0.3)
        if metric == "accuracy" and not loss and max(y for _, y in points) <= 1:
            ax.yaxis.set_major_formatter(PercentFormatter(1))
        tooltips = [Tooltip(ax, x, y, f"epoch {x:g}\n{key} {y:.4f}") for x, y in points]

    def shown(value: float) -> str:
        return f"{value:.4f}" if loss else score(value, metric)

    best = (min if loss else max)(points, key=lambda p: p[1])
    beside = "".join(f"; {_LEVELS[s][0]}: {shown(level)}" for s, level in levels.items())
    return ReportFigure(
        "training",
        "Through fine-tuning",
        f"{key} over {len(points)} epoch{'s' * (len(points) != 1)} of fine-tuning, from {shown(points[0][1])} to "
        f"{shown(points[-1][1])}, best in epoch {best[0]:g} with {shown(best[1])}{beside}.",
        "The validation metric after each epoch with fake-quantized weights and activations.",
        figure,
        ["epoch", key, *levels],
        [[f"{x:g}", f"{y:.6g}", *(f"{v:.6g}" for v in levels.values())] for x, y in points],
        tooltips,
    )


def _points(history: object, key: str) -> list[tuple[float, float]]:
    """Epoch and value of the entries of fine-tuning that hold both as numbers; whatever else is there is left out."""
    points = []
    for entry in history if isinstance(history, list) else []:
        if isinstance(entry, Mapping) and entry.get("phase", "fine_tuning") == "fine_tuning":
            epoch, value = (finite(entry.get(k)) for k in ("epoch", key))
            if epoch is not None and value is not None:
                points.append((epoch, value))
    return points
