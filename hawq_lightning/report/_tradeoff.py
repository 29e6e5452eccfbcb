"""The frontier with the chosen plan and the uniform points (paper, Fig. 4)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

from hawq_lightning._plan import Plan
from hawq_lightning.report._figure import BLUE, GREEN, INK, ORANGE, SOFT, ReportFigure, Tooltip, canvas, log_scale
from hawq_lightning.report._run import FrontierPoint, Run
from hawq_lightning.report._text import size, times

_MOST_MARKS = 400
_MOST_ROWS = 1000


def draw_frontier(run: Run) -> ReportFigure | None:
    """Omega against the size of the weights: every plan that no other beats, the chosen one, and the uniform ones."""
    points, plan = run.frontier, run.plan
    if not points:
        return None
    float_bytes = float(plan.costs.get("float_weight_bytes") or 4 * sum(s.numel for s in plan.weights)) if plan else 0.0
    chosen = _chosen(plan, points) if plan else None
    uniform = uniform_points(plan, _offset(plan, points)) if plan else []
    positive = [p.omega for p in points if p.omega > 0]
    floor = min(positive, default=1e-12) / 2
    unit, unit_name = (1024, "KiB") if points[-1].cost < 4 << 20 else (1 << 20, "MiB")
    with canvas(1, 4.4) as (figure, axes):
        ax = axes[0]
        omegas = [max(p.omega, floor) for p in points]
        dot = 4 if len(points) <= _MOST_MARKS else 1
        ax.plot(
            [p.cost / unit for p in points],
            omegas,
            drawstyle="steps-post",
            color=BLUE,
            linewidth=1.6,
            label="frontier",
            zorder=2,
        )
        ax.plot([p.cost / unit for p in points], omegas, ".", color=BLUE, markersize=dot, zorder=3)
        if uniform:
            xs, ys = [c / unit for _, c, _ in uniform], [max(o, floor) for _, _, o in uniform]
            ax.plot(xs, ys, "^", color=GREEN, markersize=9, label="uniform", zorder=4)
            for (bits, _, _), x, y in zip(uniform, xs, ys):
                place = {"xytext": (7, 7), "textcoords": "offset points", "fontsize": 10, "color": INK}
                ax.annotate(f"{bits} bit", (x, y), **place)  # type: ignore[arg-type]
        if chosen:
            label = "chosen" + (f", {times(float_bytes / chosen.cost)}" if float_bytes else "")
            ax.plot(
                chosen.cost / unit, max(chosen.omega, floor), "D", color=ORANGE, markersize=10, label=label, zorder=5
            )
        log_scale(ax, "y")
        ax.set_ylim(bottom=floor)
        ax.set_xlabel(f"size of the quantized weights ({unit_name})", color=SOFT)
        ax.set_ylabel("Ω, second-order perturbation", color=SOFT)
        ax.legend(loc="upper right")
    marks = [(p.cost, p.omega, _plan_text(p.cost, p.omega, float_bytes, p.bits)) for p in _thin(points)]
    marks += [(c, o, f"all weights {b} bit\n{_plan_text(c, o, float_bytes)}") for b, c, o in uniform]
    if chosen and plan:
        text = _plan_text(chosen.cost, chosen.omega, float_bytes, {s.name: s.bits for s in plan.weights})
        marks.append((chosen.cost, chosen.omega, f"the chosen plan\n{text}"))
    thinned = len(points) > _MOST_ROWS
    names = list(dict.fromkeys(n for p in points for n in p.bits))
    return ReportFigure(
        "frontier",
        "What smaller weights cost",
        f"{len(points)} plans between {size(points[0].cost)} and {size(points[-1].cost)}: omega falls from "
        f"{points[0].omega:.3g} to {points[-1].omega:.3g}."
        + (f" The chosen plan has {size(chosen.cost)} and omega {chosen.omega:.3g}." if chosen else "")
        + _beats(uniform, points),
        "Each dot is a plan that no other beats in both size and predicted harm (Ω, twice the predicted rise of the "
        "loss before fine-tuning). Point at one to see its bits, first layer left."
        + (" Triangles give every weight the same bits." if uniform else "")
        + (f" The table has every {-(-len(points) // _MOST_ROWS)}th plan, frontier.csv more." if thinned else ""),
        figure,
        ["weight_bytes", "w_comp", "omega", *names],
        [
            [f"{p.cost:g}", f"{float_bytes / p.cost:.4g}" if float_bytes and p.cost else "", f"{p.omega:.6g}"]
            + [p.bits.get(n, "") for n in names]
            for p in _thin(points, _MOST_ROWS)
        ],
        [Tooltip(figure.axes[0], cost / unit, max(omega, floor), text) for cost, omega, text in marks],
    )


def _chosen(plan: Plan, points: Sequence[FrontierPoint]) -> FrontierPoint:
    plan_bits = plan.bits
    for point in points:
        if point.bits and all(plan_bits.get(n, b) == b for n, b in point.bits.items()):
            return FrontierPoint(point.cost, point.omega, point.bits)
    cost = float(plan.costs.get("weight_bytes") or sum(s.numel * s.bits for s in plan.weights) / 8)
    return FrontierPoint(cost, sum(s.omega or 0.0 for s in plan.weights) + _offset(plan, points))


def uniform_points(plan: Plan, offset: float) -> list[tuple[int, float, float]]:
    """Bits, bytes and omega of the plans that give every weight the same width."""
    tables = [{o.bits: o.omega for o in s.options} for s in plan.weights]
    common = set.intersection(*(set(t) for t in tables)) if tables else set()
    total = sum(s.numel for s in plan.weights)
    return [(b, total * b / 8, offset + sum(t[b] for t in tables)) for b in sorted(common)]


def _offset(plan: Plan, points: Sequence[FrontierPoint]) -> float:
    """What the frontier's omega has beyond the weights': that of the activations, the same at every point."""
    tables: Mapping[str, Mapping[int, float]] = {s.name: {o.bits: o.omega for o in s.options} for s in plan.weights}
    for point in points:
        try:
            weights = sum(tables[n][point.bits[n]] for n in tables)
        except KeyError:
            continue
        rest = point.omega - weights
        return rest if abs(rest) > 1e-9 * max(abs(point.omega), abs(weights)) else 0.0
    return 0.0


def _beats(uniform: Sequence[tuple[int, float, float]], points: Sequence[FrontierPoint]) -> str:
    parts = []
    for bits, cost, omega in uniform:
        best = min((p.omega for p in points if p.cost <= cost * (1 + 1e-9)), default=None)
        if best and omega > best * 1.05:
            parts.append(f"uniform {bits} bit has {omega / best:.1f} times the omega of the plan of its size")
    return f" {'; '.join(parts).capitalize()}." if parts else ""


def _thin(points: Sequence[FrontierPoint], most: int = _MOST_MARKS) -> Sequence[FrontierPoint]:
    step = max(1, -(-len(points) // most))
    return [*points[:-1:step], points[-1]]


def _plan_text(cost: float, omega: float, float_bytes: float, bits: Mapping[str, int] = MappingProxyType({})) -> str:
    ratio = f", {times(float_bytes / cost)} smaller weights" if float_bytes and cost else ""
    widths = " ".join(str(b) for name, b in bits.items() if name.endswith(".weight"))
    return f"{size(cost)}{ratio}\nΩ {omega:.4g}" + (f"\nbits {widths}" if widths else "")
