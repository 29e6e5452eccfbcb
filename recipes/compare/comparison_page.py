"""The tables of a comparison in the paper's form (Tables 1 to 3), as Markdown and CSV, and a figure."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bootstrap import Interval
from comparison import STAGES, Comparison, Row, read_comparison, widths
from matplotlib.ticker import PercentFormatter

from hawq_lightning import HawqError
from hawq_lightning.report import (
    BLUE,
    GREEN,
    ORANGE,
    SOFT,
    ReportFigure,
    canvas,
    csv_text,
    markdown_table,
    score,
    size,
    write_text,
)

COLUMNS = ["Method", "w-bits", "a-bits", "before", "BatchNorm", "after", "against {}", "W-Comp", "A-Comp", "Size",
           "Perturb. (Ω)", "Σ‖ΔW‖²"]  # fmt: skip
_SHORT = ("Method", "w-bits", "a-bits", "after", "W-Comp", "Size", "Perturb. (Ω)", "Σ‖ΔW‖²")  # the paper's Table 3
_FLOAT = ["Baseline", "32", "32", "–", "–", "–", "", "1.00×", "1.00×", "", "0", "0"]
# the paper's ablations: heading, methods that it sets beside the reference
ABLATIONS = {
    "Large against small perturbation (Table 3a)": ("direct", "max_perturbation"),
    "Trace-weighted against plain perturbation (Table 3b)": ("l2",),
}


def write_comparison(
    out: str | Path, target: str | Path | None = None, draws: int = 2000, title: str = "Methods at equal size"
) -> Comparison:
    """Read the runs of a sweep and write ``compare.md``, ``compare.csv``, ``runs.csv`` and ``figures/compare.png``.

    Args:
        out: folder of the sweep.
        target: folder to write to; ``out`` itself by default.
        draws: bootstrap samples.
        title: heading of the page.

    Raises:
        HawqError: no finished run, or ``target`` cannot be written to.
    """
    comparison = read_comparison(out, draws)
    target = Path(target) if target is not None else Path(out)
    text = [f"# {title}", "", f"Float network: {score(comparison.float_score, comparison.metric)}.", ""]
    if len(comparison.rows) > 1:
        via = " BatchNorm measured again →" if comparison.has_batchnorm else ""
        text += [f"Before →{via} after fine-tuning:", "", *markdown_table(*overview(comparison)), ""]
    for rows in comparison.rows.values():
        text += [f"## {rows[0].first.labels['setting']}", "", *markdown_table(*table(comparison, rows)), ""]
        for heading, methods in ABLATIONS.items():
            part = [r for r in rows if r.first.method in methods or r.first.reference]
            if len(part) == len(methods) + 1:
                text += [f"### {heading}", "", *markdown_table(*ablation(comparison, part)), ""]
    if comparison.pooled:
        heading = "All settings together" if len(comparison.rows) > 1 else "Stage by stage"
        text += [f"## {heading}", "", *markdown_table(*pooled(comparison)), ""]
    text += [_legend(comparison), ""]
    if comparison.left_out:
        text += ["Left out:", "", *(f"- {k}: {v}" for k, v in comparison.left_out.items()), ""]
    try:
        write_text(target / "compare.md", "\n".join(text))
        write_text(target / "compare.csv", csv_text(*numbers(comparison)))
        write_text(target / "runs.csv", csv_text(*run_numbers(comparison)))
        draw(comparison).save(target / "figures")
    except OSError as error:
        raise HawqError(f"Cannot write to {target}: {error.strerror or error}.") from error
    return comparison


def table(comparison: Comparison, rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """One setting, for people."""
    reference = next((r.first.labels["method"] for r in rows if r.first.reference), "–")
    columns = [c.format(reference) for c in COLUMNS]
    start = [*_FLOAT[:5], score(comparison.float_score, comparison.metric), *_FLOAT[6:]]
    shown = [start, *(_cells(comparison.metric, r) for r in rows)]
    if comparison.has_batchnorm:
        return columns, shown
    place = columns.index("BatchNorm")
    return [c for i, c in enumerate(columns) if i != place], [row[:place] + row[place + 1 :] for row in shown]


def pooled(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """Differences to the reference over all settings that have both."""
    reference = next(r.first.labels["method"] for rows in comparison.rows.values() for r in rows if r.first.reference)
    stages = _stages(comparison)
    names = ["BatchNorm measured again" if s == "batchnorm" else s for s in stages]
    columns = ["Method", "settings × seeds", *(f"{n}, against {reference}" for n in names)]
    rows = []
    for p in comparison.pooled:
        found: list[Interval | None] = [getattr(p, s) for s in stages]
        differences = ["–" if i is None else _difference(comparison.metric, i) for i in found]
        rows.append([p.label, str(p.pairs), *differences])
    return columns, rows


def overview(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """Methods by settings; one mark: the interval against the reference excludes zero."""
    labels = {r.first.method: r.first.labels["method"] for rows in comparison.rows.values() for r in rows}
    table_of = {s: {r.first.method: r for r in rows} for s, rows in comparison.rows.items()}
    columns = ["Method", *(rows[0].first.labels["setting"] for rows in comparison.rows.values())]
    shown = []
    for method, label in labels.items():
        cells = [label]
        for rows in table_of.values():
            if (row := rows.get(method)) is None:
                cells.append("–")
                continue
            mark = " *" if row.against is not None and row.against.excludes_zero else ""
            first = [score(row.mean(s), comparison.metric) for s in _stages(comparison)[:-1]]
            cells.append(" → ".join([*first, f"{_mean(comparison.metric, row, 'after')}{mark}"]))
        shown.append(cells)
    return columns, shown


def ablation(comparison: Comparison, rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """The columns of the paper's Table 3, smallest perturbation last."""
    columns, full = table(comparison, sorted(rows, key=lambda r: -r.number("omega")))
    places = [columns.index(c) for c in _SHORT]
    return [columns[i] for i in places], [[row[i] for i in places] for row in full]


def numbers(comparison: Comparison) -> tuple[list[str], list[list[object]]]:
    """Every row with all digits."""
    stages = _stages(comparison)
    ends = (*stages, "against")
    columns = ["setting", "method", "seeds", "w_bits", "a_bits", "w_comp", "a_comp", "weight_bytes", "omega",
               "perturbation", *(f"{s}_sd" for s in stages)]  # fmt: skip
    columns += [f"{s}{e}" for s in ends for e in ("", "_low", "_high")]
    out: list[list[object]] = []
    for setting, rows in comparison.rows.items():
        for r in rows:
            cells: list[object] = [setting, r.first.method, len(r.runs), widths(r.first.plan, "weight"),
                                   widths(r.first.plan, "activation")]  # fmt: skip
            cells += [r.number(k) for k in ("w_comp", "a_comp", "weight_bytes", "omega", "perturbation")]
            cells += ["" if (v := r.spread(s)) is None else v for s in stages]
            for s in ends:
                i: Interval | None = getattr(r, s)
                mean = None if s == "against" else r.mean(s)
                cells += [i.value, i.low, i.high] if i else ["" if mean is None else mean, "", ""]
            out.append(cells)
    return columns, out


def run_numbers(comparison: Comparison) -> tuple[list[str], list[list[object]]]:
    """Every run with all digits."""
    stages = _stages(comparison)
    columns = ["setting", "method", "seed", "tuned", *stages, "weight_bytes", "omega"]
    out: list[list[object]] = []
    for setting, rows in comparison.rows.items():
        for r in (run for row in rows for run in row.runs):
            tuned = " ".join(f"{k}={v}" for k, v in r.tuned.items())
            scores = ["" if (v := getattr(r, s)) is None else v for s in stages]
            out.append([setting, r.method, r.seed, tuned, *scores, r.plan.costs["weight_bytes"], r.plan.omega])
    return columns, out


def draw(comparison: Comparison) -> ReportFigure:
    """Scores after fine-tuning, a panel a setting; a bar is the interval, a faint mark a seed."""
    scale = 100 if comparison.metric == "accuracy" else 1
    settings = list(comparison.rows.items())
    height = sum(0.34 * len(rows) + 0.9 for _, rows in settings) + 0.4
    with canvas(len(settings), height, height_ratios=[len(rows) + 2 for _, rows in settings]) as (figure, axes):
        for ax, (_, rows) in zip(axes, settings):
            ax.set_title(rows[0].first.labels["setting"])
            for y, row in enumerate(rows):
                colour = ORANGE if row.first.reference else BLUE
                points = [scale * r.after for r in row.runs if r.after is not None]
                ax.plot(points, [y] * len(points), "o", color=colour, alpha=0.4, markersize=4, zorder=3)
                if row.after:
                    ends = [scale * row.after.low, scale * row.after.high]
                    ax.plot(ends, [y, y], color=colour, linewidth=2.2, zorder=2)
                    ax.plot(scale * row.after.value, y, "D", color=colour, markersize=7, zorder=4)
            if comparison.float_score is not None:
                ax.axvline(scale * comparison.float_score, color=GREEN, linestyle="--", linewidth=1.2)
            names = [f"{r.first.labels['method']} ({score(r.mean('before'), comparison.metric)})" for r in rows]
            ax.set_yticks(range(len(rows)), names)
            ax.set_ylim(len(rows) - 0.5, -0.5)
            if comparison.metric == "accuracy":
                ax.xaxis.set_major_formatter(PercentFormatter(100, decimals=1))
        axes[-1].set_xlabel(f"{comparison.metric} after fine-tuning (in brackets before it); dashed: float", color=SOFT)
    columns, rows_of = numbers(comparison)
    alt = "; ".join(
        f"{rows[0].first.labels['setting']}: "
        + ", ".join(f"{r.first.labels['method']} {score(r.mean('after'), comparison.metric)}" for r in rows)
        for _, rows in settings
    )
    return ReportFigure("compare", "Methods at equal size", alt, _legend(comparison), figure, columns, rows_of)


def _stages(comparison: Comparison) -> list[str]:
    """The stages that the sweep has."""
    return [s for s in STAGES if s != "batchnorm" or comparison.has_batchnorm]


def _cells(metric: str, row: Row) -> list[str]:
    plan = row.first.plan
    a_comp = row.number("a_comp")
    return [
        row.first.labels["method"],
        widths(plan, "weight"),
        widths(plan, "activation"),
        *(_mean(metric, row, s) for s in STAGES),
        "–" if row.against is None else _difference(metric, row.against),
        f"{row.number('w_comp'):.2f}×",
        f"{a_comp:.2f}×" if a_comp == a_comp else "1.00×",
        size(row.number("weight_bytes")),
        f"{row.number('omega'):.3g}",
        f"{row.number('perturbation'):.3g}",
    ]


def _mean(metric: str, row: Row, stage: str) -> str:
    mean, spread = row.mean(stage), row.spread(stage)
    if spread is None:
        return score(mean, metric)
    return f"{score(mean, metric)} ± {100 * spread:.2f}" if metric == "accuracy" else f"{mean:.3f} ± {spread:.3f}"


def _difference(metric: str, interval: Interval) -> str:
    scale, digits = (100, 2) if metric == "accuracy" else (1, 3)
    value, low, high = (f"{scale * v:+.{digits}f}" for v in (interval.value, interval.low, interval.high))
    return f"{value} [{low}, {high}]" + (" *" if interval.excludes_zero else "")


def _legend(comparison: Comparison) -> str:
    seeds = sorted({len(r.runs) for rows in comparison.rows.values() for r in rows})
    over = "images and seeds" if comparison.metric == "accuracy" else "images"
    return (
        f"Before and after fine-tuning: mean ± standard deviation over seeds ({', '.join(map(str, seeds))} a row; one "
        f"seed has no ±). Against the reference: paired difference with its 95% bootstrap interval over {over}; * "
        "marks those that exclude zero. Ω sums weights and activations; Σ‖ΔW‖² is of the weights. Sizes are those of "
        "the codes; KiB are 1,024 bytes."
    )
