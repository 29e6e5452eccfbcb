"""What a size costs before it is tried: expected KL and share of changed predictions along the frontier."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes

from hawq_lightning.report._figure import BLUE, GREEN, ORANGE, SOFT, ReportFigure, Tooltip, canvas, log_scale
from hawq_lightning.report._run import EXPECTED, FrontierPoint, Run
from hawq_lightning.report._text import size, times

_MOST = 400
Stage = tuple[str, str, str, str, str, str]
_STAGES: tuple[Stage, ...] = (  # suffix of the columns, network, in words, colour, line, mark of what was measured
    ("", "quantizing", "right after quantizing", BLUE, "-", "o"),
    ("_batchnorm", "batchnorm", "BatchNorm measured again", GREEN, "--", "s"),
)


def draw_outlook(run: Run) -> ReportFigure | None:
    """Expected KL, and expected share of changed predictions where there are any, against the size of the weights."""
    points = [p for p in run.frontier if "kl" in p.expected or "kl_batchnorm" in p.expected]
    if len(points) < 2:
        return None
    step = max(1, -(-len(points) // _MOST))
    points = [*points[:-1:step], points[-1]]
    columns = [c for c in EXPECTED if all(c in p.expected for p in points)]
    unit, unit_name = (1024, "KiB") if points[-1].cost < 4 << 20 else (1 << 20, "MiB")
    kinds = [k for k in ("kl", "changed") if any(c.split("_")[0] == k for c in columns)]
    float_bytes = float(run.plan.costs.get("float_weight_bytes", 0.0)) if run.plan else 0.0
    texts = [_text(p, float_bytes) for p in points]
    tooltips: list[Tooltip] = []
    with canvas(len(kinds), 3.6 * len(kinds), sharex=True) as (figure, axes):
        for ax, kind in zip(axes, kinds):
            for stage in _STAGES:
                if f"{kind}{stage[0]}" in columns:
                    _line(ax, run, points, kind, stage, unit)
            if run.plan and "weight_bytes" in run.plan.costs:
                ax.axvline(run.plan.costs["weight_bytes"] / unit, color=ORANGE, linewidth=1.2, label="the chosen plan")
            if kind == "kl":
                log_scale(ax, "y")
            ax.set_ylabel("expected KL to the float network" if kind == "kl" else "changed predictions (%)", color=SOFT)
            ax.legend(loc="upper right")
            first = next(c for c in columns if c.split("_")[0] == kind)
            scale = 100 if kind == "changed" else 1
            tooltips += [
                Tooltip(ax, p.cost / unit, scale * p.expected[first], text)
                for p, text in zip(points, texts)
                if kind == "changed" or p.expected[first] > 0
            ]
        axes[-1].set_xlabel(f"size of the quantized weights ({unit_name})", color=SOFT)
    quality = run.outlook.quality() if run.outlook else ""
    return ReportFigure(
        "outlook",
        "What a size costs, before it is tried",
        f"Expected loss of {len(points)} plans between {size(points[0].cost)} and {size(points[-1].cost)}: "
        + "; ".join(_end(points, c) for c in columns)
        + ".",
        "Every plan of the frontier, forecast by path attribution without labels or training; marks are plans that "
        f"were measured on held-out data. {quality} Fine-tuning comes after this, and mostly lowers both.",
        figure,
        ["weight_bytes", *columns],
        [[f"{p.cost:g}", *(f"{p.expected[c]:.6g}" for c in columns)] for p in points],
        tooltips,
    )


def _line(ax: Axes, run: Run, points: Sequence[FrontierPoint], kind: str, stage: Stage, unit: int) -> None:
    """Draw one network's expectations and measurements."""
    suffix, after, words, colour, line, mark = stage
    scale = 100 if kind == "changed" else 1
    ys = [scale * p.expected[f"{kind}{suffix}"] for p in points]
    ax.plot([p.cost / unit for p in points], ys, line, color=colour, linewidth=1.6, label=words, zorder=2)
    rows = [m for m in run.outlook.measured if m.after == after] if run.outlook else []
    found = [(m.weight_bytes / unit, m.kl if kind == "kl" else m.changed) for m in rows]
    marks = [(x, scale * y) for x, y in found if y is not None and (y > 0 or kind == "changed")]
    if marks:
        ax.plot(*zip(*marks), mark, color=colour, markersize=6, markerfacecolor="none", label="measured", zorder=3)


def _text(point: FrontierPoint, float_bytes: float) -> str:
    """What the browser shows over a point."""
    lines = [size(point.cost) + (f", {times(float_bytes / point.cost)} smaller weights" if float_bytes else "")]
    for suffix, _, words, *_ in _STAGES:
        parts = []
        if (kl := point.expected.get(f"kl{suffix}")) is not None:
            parts.append(f"KL {kl:.3g}")
        if (changed := point.expected.get(f"changed{suffix}")) is not None:
            parts.append(f"{100 * (1 - changed):.2f}% of the predictions unchanged")
        if parts:
            lines.append(f"{words}: {', '.join(parts)}")
    if widths := " ".join(str(b) for name, b in point.bits.items() if name.endswith(".weight")):
        lines.append(f"bits {widths}")
    return "\n".join(lines)


def _end(points: Sequence[FrontierPoint], column: str) -> str:
    low, high = points[-1].expected[column], points[0].expected[column]
    return f"{column.replace('_', ' with ')} from {high:.3g} down to {low:.3g}"
