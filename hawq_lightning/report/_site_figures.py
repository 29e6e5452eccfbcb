"""Figures along the network: bits of every site (paper, Fig. 1) and mean traces with error bars (Fig. 2)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes

from hawq_lightning._code_formats import code_bytes
from hawq_lightning._plan import PlanSite
from hawq_lightning.report._figure import BLUE, INK, ORANGE, PAPER, SOFT, ReportFigure, Tooltip, canvas, log_scale
from hawq_lightning.report._run import Run
from hawq_lightning.report._text import count, names, size
from hawq_lightning.sensitivity import SiteTrace

KINDS = {"weight": ("weights", BLUE, "o"), "activation": ("activations", ORANGE, "s")}
_MOST_LABELS = 60
_MOST_SLANTED = 24


def draw_bits(run: Run) -> ReportFigure | None:
    """Bits of weights and activations over the layers, first to last."""
    plan = run.plan
    if plan is None:
        return None
    kinds = [k for k in KINDS if any(s.kind == k for s in plan.sites)]
    tooltips: list[Tooltip] = []
    with canvas(len(kinds), 1.2 + (1.75 + _room(plan.sites)) * len(kinds)) as (figure, axes):
        for ax, kind in zip(axes, kinds):
            sites = [s for s in plan.sites if s.kind == kind]
            label, colour, _ = KINDS[kind]
            bits = [s.bits for s in sites]
            ax.bar(range(len(sites)), bits, color=colour, width=0.8, zorder=2)
            if len(sites) <= _MOST_LABELS:
                for i, b in enumerate(bits):
                    ax.text(i, b + 0.2, str(b), ha="center", va="bottom", fontsize=9, color=INK)
            ax.set_ylim(0, 9.4)
            ax.set_yticks([0, 2, 4, 8])
            ax.set_ylabel("bits")
            ax.set_title(f"{label}: {_spread(bits)}")
            ax.grid(False, axis="x")
            name_layers(ax, [s.name for s in sites])
            tooltips += [Tooltip(ax, i, s.bits / 2, _site_text(s)) for i, s in enumerate(sites)]
    weights = plan.weights
    low = [s.name.removesuffix(".weight") for s in weights if s.bits == min(w.bits for w in weights)]
    mean = sum(s.numel * s.bits for s in weights) / max(1, sum(s.numel for s in weights))
    return ReportFigure(
        "bits",
        "Bits along the network",
        f"Bars of bit-widths over {len(weights)} weights"
        + (f" and {len(plan.activations)} activations" if plan.activations else "")
        + f" in network order. Weights have {_spread([s.bits for s in weights])}, {mean:.2f} bits a weight on average; "
        f"the narrowest are {names(low)}.",
        f"What the selector chose for every site, from the input (left) to the output (right). Weighted by its size, a "
        f"weight has {mean:.2f} bits.",
        figure,
        ["site", "kind", "shape", "elements", "bits", "code", "omega", "perturbation", "stability"],
        [
            [s.name, s.kind, "x".join(map(str, s.shape)), s.numel, s.bits, s.code,
             _short(s.omega), _short(s.perturbation), _short(s.stability)]
            for s in plan.sites
        ],
        tooltips,
    )  # fmt: skip


def draw_traces(run: Run) -> ReportFigure | None:
    """Mean Hessian trace of every site on a log scale, with two kinds of standard error."""
    records = list(run.sensitivity or ())
    if not records:
        return None
    kinds = [k for k in KINDS if any(r.kind == k for r in records)]
    chosen = run.plan.bits if run.plan else {}
    tooltips: list[Tooltip] = []
    with canvas(len(kinds), 0.9 + (2.5 + _room(records)) * len(kinds)) as (figure, axes):
        for ax, kind in zip(axes, kinds):
            tooltips += _trace_axes(ax, [r for r in records if r.kind == kind], kind, chosen)
    top = sorted(records, key=lambda r: -r.mean_trace)
    positive = [r.mean_trace for r in records if r.mean_trace > 0]
    span = f"They span a factor of {max(positive) / min(positive):,.0f}. " if len(positive) > 1 else ""
    return ReportFigure(
        "traces",
        "How sensitive each site is",
        f"Mean Hessian trace of {len(records)} sites on a log scale, with error bars. {span}"
        f"The most sensitive are {', '.join(f'{r.name} ({r.mean_trace:.3g})' for r in top[:3])}; "
        f"the least is {top[-1].name} ({top[-1].mean_trace:.3g}).",
        "Average Hessian trace: how sharply the loss curves when this tensor is disturbed. Thick bars: one standard "
        "error on the same images; thin bars: with the choice of images added. Hollow marks are within two standard "
        "errors of zero; triangles at the floor are zero or negative. Where no bar shows, it is smaller than the mark.",
        figure,
        ["site", "kind", "elements", "trace", "stderr", "stderr_data", "mean_trace", "bits"],
        [
            [r.name, r.kind, r.numel, _short(r.trace), _short(r.stderr), _short(r.stderr_data), _short(r.mean_trace),
             chosen.get(r.name, "")]
            for r in records
        ],
        tooltips,
    )  # fmt: skip


def uncertain(record: SiteTrace) -> bool:
    """A trace within two standard errors of zero says little."""
    return record.trace < 2 * record.stderr or record.trace <= 0


def name_layers(ax: Axes, labels: Sequence[str]) -> None:
    """Site names below the axis, as many as stay readable."""
    short = [n.removesuffix(".weight").removesuffix(".input") for n in labels]
    heads = {n.partition(".")[0] for n in short}
    if len(heads) == 1 and all("." in n for n in short):  # a task's one attribute, such as net, says nothing
        short = [n.partition(".")[2] for n in short]
    step = max(1, math.ceil(len(short) / _MOST_LABELS))
    places = range(0, len(short), step)
    long = max(map(len, short), default=0) * len(places) > 90
    ax.set_xticks(list(places), [_clip(short[i]) for i in places])
    ax.tick_params(axis="x", length=0, labelsize=9 if len(places) <= _MOST_SLANTED else 7)
    if long:
        ax.tick_params(axis="x", rotation=90 if len(places) > _MOST_SLANTED else 45)
        for text in ax.get_xticklabels():
            text.set_horizontalalignment("center" if len(places) > _MOST_SLANTED else "right")
            text.set_rotation_mode("default" if len(places) > _MOST_SLANTED else "anchor")
    ax.set_xlim(-0.7, len(short) - 0.3)


def _trace_axes(ax: Axes, records: Sequence[SiteTrace], kind: str, chosen: Mapping[str, int]) -> list[Tooltip]:
    label, colour, marker = KINDS[kind]
    positive = [r.mean_trace for r in records if r.mean_trace > 0]
    floor = min(positive, default=1.0) / 3
    tooltips, xs, ys, errors = [], [], [], []
    for i, r in enumerate(records):
        # errors scale as the mean does; a zero trace has only the plain division
        scale = abs(r.mean_trace / r.trace) if r.trace else 1 / r.numel
        value = max(r.mean_trace, floor)
        xs.append(i)
        ys.append(value)
        sampling = r.stderr_data if math.isfinite(r.stderr_data) else r.stderr  # of one batch it is not known
        errors.append((r.stderr * scale, sampling * scale))
        bits = f"\n{chosen[r.name]} bits chosen" if r.name in chosen else ""
        text = f"{r.name}\nmean trace {r.mean_trace:.3g} ± {r.stderr * scale:.1g}\n{count(r.numel)} elements{bits}"
        tooltips.append(Tooltip(ax, i, value, text))
    for which, width in ((1, 1.0), (0, 3.0)):
        at = [i for i, r in enumerate(records) if r.mean_trace > 0]
        low = [max(ys[i] - errors[i][which], floor) for i in at]
        ax.vlines(at, low, [ys[i] + errors[i][which] for i in at], color=colour, linewidth=width, zorder=2)
    for face, shape, places in (
        (colour, marker, [i for i, r in enumerate(records) if r.mean_trace > 0 and not uncertain(r)]),
        (PAPER, marker, [i for i, r in enumerate(records) if r.mean_trace > 0 and uncertain(r)]),
        (PAPER, "v", [i for i, r in enumerate(records) if r.mean_trace <= 0]),
    ):
        where = [xs[i] for i in places], [ys[i] for i in places]
        ax.plot(*where, shape, color=colour, markerfacecolor=face, markersize=6, zorder=3)
    log_scale(ax, "y")
    ax.set_ylim(bottom=floor / 1.3)
    ax.set_title(label)
    ax.set_ylabel("mean trace", color=SOFT)
    ax.grid(False, axis="x")
    name_layers(ax, [r.name for r in records])
    return tooltips


def _room(sites: Sequence[PlanSite] | Sequence[SiteTrace]) -> float:
    """Inches for upright labels, which many sites need."""
    return 0.9 if max(sum(s.kind == kind for s in sites) for kind in KINDS) > _MOST_SLANTED else 0.0


def _site_text(s: PlanSite) -> str:
    parts = [s.name, f"{s.bits} bits ({s.code})", f"{'x'.join(map(str, s.shape))}: {count(s.numel)} elements"]
    if s.kind == "weight":
        parts.append(f"{size(4 * s.numel)} float → {size(code_bytes(s.numel, s.bits, s.code))}")
    if s.omega is not None:
        parts.append(f"Ω {s.omega:.3g}")
    return "\n".join(parts)


def _spread(bits: Sequence[int]) -> str:
    kinds = sorted(set(bits), reverse=True)
    if len(kinds) == 1:
        return f"all {kinds[0]} bits"
    return ", ".join(f"{bits.count(b)} at {b} bits" for b in kinds)


def _clip(name: str) -> str:
    return name if len(name) <= 26 else "…" + name[-25:]


def _short(value: float | None) -> float | str:
    return "" if value is None else float(f"{value:.6g}")
