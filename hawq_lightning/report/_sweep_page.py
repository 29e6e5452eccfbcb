"""What is written of a sweep: sweep.html, sweep.md, sweep.csv and figures/accuracy_size.png."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path

from matplotlib.ticker import PercentFormatter

from hawq_lightning._csv import csv_text
from hawq_lightning._errors import HawqError
from hawq_lightning._io import write_text
from hawq_lightning.report._card import markdown_table, markdown_text
from hawq_lightning.report._figure import BLUE, GREEN, ORANGE, PURPLE, SOFT, ReportFigure, Tooltip, canvas
from hawq_lightning.report._page import render
from hawq_lightning.report._sweep import NUMBERS, Row, Sweep, read_sweep
from hawq_lightning.report._text import falls, score, size, times

_STAGES = ("float", "quantized", "fine_tuned")
_STYLES = ((BLUE, "o"), (ORANGE, "s"), (GREEN, "^"), (PURPLE, "D"))
_LABEL_LETTERS = 28
_LEGEND_ENTRIES = 8

Table = tuple[list[str], list[list[str]]]


def collect(folder: str | Path, out: str | Path | None = None) -> Sweep:
    """Read every run below ``folder`` and write the sweep's page, tables and picture.

    Args:
        folder: of the sweep.
        out: where to write; ``folder`` itself by default.

    Returns:
        What was read.

    Raises:
        HawqError: no finished run there, or ``out`` cannot be written to.
    """
    sweep = read_sweep(folder)
    target = Path(out) if out is not None else sweep.folder
    figure = draw_sweep(sweep)
    titles = {r.title for r in sweep.rows}
    title = titles.pop() if len(titles) == 1 else f"Sweep: {sweep.folder.resolve().name}"
    tables = {"Mean over seeds": mean_table(sweep), "Runs": run_table(sweep)}
    card = [f"# {markdown_text(title)}", "", markdown_text(sweep_facts(sweep)), ""]
    for heading, table in tables.items():
        card += [f"## {heading}", "", *markdown_table(*table), ""]
    if sweep.left_out:
        card += ["## Left out", "", *markdown_table(["run", "why"], list(sweep.left_out.items())), ""]
    page = render(
        kind="Sweep of mixed-precision quantization",
        title=title,
        summary=sweep_facts(sweep),
        figures=[figure] if figure else [],
        tables=tables,
        left_out=("Left out", list(sweep.left_out.items())),
        footer="Sizes in KiB and MiB are powers of 1024; ± is the standard deviation over seeds.",
    )
    try:
        if figure:
            figure.save(target / "figures")
        write_text(target / "sweep.csv", csv_text(*_raw_table(sweep)))
        write_text(target / "sweep.md", "\n".join(card))
        write_text(target / "sweep.html", page)
    except OSError as error:
        raise HawqError(f"Cannot write to {target}: {error.strerror or error}.") from error
    return sweep


def sweep_facts(sweep: Sweep) -> str:
    """One sentence: how many runs, settings and seeds; and how many are missing."""
    seeds = len({r.seed for r in sweep.rows})
    runs, settings = _many(len(sweep.rows), "finished run"), _many(len(sweep.groups()), "setting")
    text = f"{runs} of {settings}, {_many(seeds, 'seed')}."
    return text + (f" {_many(len(sweep.left_out), 'run')} left out." if sweep.left_out else "")


def run_table(sweep: Sweep) -> Table:
    """Every run, for people."""
    columns = ["name", "selector", "budget", *sweep.varied, "seed", "metric", "float", "after quantizing",
               "after fine-tuning", "smaller", "quantized weights", "whole model", "file", "time"]  # fmt: skip
    rows = []
    for r in sweep.rows:
        n = r.numbers
        seconds = f"{n['seconds']:.0f} s" if "seconds" in n else "–"
        rows.append(
            [r.title, r.selector, r.budget, *(r.overrides.get(k, "") for k in sweep.varied), r.seed, r.metric]
            + [score(r.scores.get(s), r.metric) for s in _STAGES]
            + [
                times(n.get("w_comp")),
                size(n.get("weight_bytes")),
                times(n.get("model_comp")),
                size(n.get("file_bytes")),
            ]
            + [seconds]
        )
    return columns, rows


def mean_table(sweep: Sweep) -> Table:
    """Every setting: mean and standard deviation over its seeds."""
    columns = ["name", "selector", "budget", *(["also"] if sweep.varied else []), "seeds", "metric", "float",
               "after fine-tuning", "smaller", "quantized weights", "whole model"]  # fmt: skip
    rows = []
    for (title, selector, budget, metric, *varied), runs in sweep.groups().items():
        floats = [r.scores["float"] for r in runs if "float" in r.scores]
        tuned = [r.score for r in runs if r.score is not None]
        also = [", ".join(varied)] if sweep.varied else []
        sizes = [times(_mean(runs, "w_comp")), size(_mean(runs, "weight_bytes")), times(_mean(runs, "model_comp"))]
        spreads = [_spread(floats, metric), _spread(tuned, metric)]
        rows.append([title, selector, budget, *also, str(len(runs)), metric, *spreads, *sizes])
    return columns, rows


def draw_sweep(sweep: Sweep) -> ReportFigure | None:
    """Score against the size of the weights: a faint mark a run, a line through the means of each selector."""
    metric = sweep.rows[0].metric
    runs = [r for r in sweep.rows if r.metric == metric and r.score is not None and r.numbers.get("weight_bytes")]
    if not runs:
        return None
    bytes_of = {r.name: r.numbers["weight_bytes"] for r in runs}
    largest = max(bytes_of.values())
    unit, unit_name = (1024, "KiB") if largest < 4 << 20 else (1 << 20, "MiB")
    curves: dict[str, list[list[Row]]] = {}  # one for each setting without its budget
    several = len({r.title for r in runs}) > 1
    for (title, selector, _, _, *varied), group in sweep.groups().items():
        label = ", ".join([*([title] if several else []), selector or "plan", *varied])
        if group := [r for r in group if r in runs]:
            curves.setdefault(label, []).append(group)
    tooltips: list[Tooltip] = []
    with canvas(1, 4.4) as (figure, (ax,)):
        for (label, groups), (colour, marker) in zip(curves.items(), cycle(_STYLES)):
            means = [statistics.fmean(bytes_of[r.name] for r in g) / unit for g in groups]
            scores = [statistics.fmean(r.score or 0.0 for r in g) for g in groups]
            legend = label if len(label) <= _LABEL_LETTERS else label[: _LABEL_LETTERS - 1] + "…"
            legend = legend if len(curves) <= _LEGEND_ENTRIES else "_"  # matplotlib leaves out what starts with _
            ax.plot(means, scores, marker=marker, color=colour, markersize=7, label=legend, zorder=4)
            points = [(bytes_of[r.name] / unit, r.score or 0.0, r) for g in groups for r in g]
            ax.plot(*zip(*[p[:2] for p in points]), marker, color=colour, alpha=0.4, markersize=4, zorder=3)
            for x, y, r in points:
                text = f"{label}\n{r.budget}, seed {r.seed}\n{size(bytes_of[r.name])}, {score(r.score, metric)}"
                tooltips.append(Tooltip(ax, x, y, text))
        if floats := [r.scores["float"] for r in runs if "float" in r.scores]:
            ax.axhline(statistics.fmean(floats), color=SOFT, linestyle=(0, (6, 3)), linewidth=1.4, label="float")
        ax.set_xlabel(f"size of the quantized weights ({unit_name})", color=SOFT)
        ax.set_ylabel(metric, color=SOFT)
        if metric == "accuracy":
            ax.yaxis.set_major_formatter(PercentFormatter(1))
        if ax.get_legend_handles_labels()[0]:
            ax.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=4, borderaxespad=0.3)
    best = (min if falls(metric) else max)(runs, key=lambda r: r.score or 0.0)
    return ReportFigure(
        "accuracy_size",
        f"{metric[0].upper()}{metric[1:]} against size",
        f"{len(runs)} runs between {size(min(bytes_of.values()))} and {size(largest)} of weights; "
        f"the {'lowest' if falls(metric) else 'highest'} {metric} is {score(best.score, metric)} at "
        f"{size(bytes_of[best.name])}.",
        "A faint mark is one run; lines go through the means over seeds. The dashed line is the float network.",
        figure,
        ["name", "selector", "budget", "seed", "weight_bytes", metric],
        [[r.title, r.selector, r.budget, r.seed, f"{bytes_of[r.name]:g}", f"{r.score:.6g}"] for r in runs],
        tooltips,
    )


def _raw_table(sweep: Sweep) -> tuple[list[str], list[list[object]]]:
    """Every run with all digits, for other programs."""
    columns = ["run", "name", "seed", "selector", "budget", *sweep.varied, "metric", *_STAGES, *NUMBERS]
    rows: list[list[object]] = []
    for r in sweep.rows:
        varied = [r.overrides.get(k, "") for k in sweep.varied]
        values = [*(r.scores.get(s, "") for s in _STAGES), *(r.numbers.get(n, "") for n in NUMBERS)]
        rows.append([r.name, r.title, r.seed, r.selector, r.budget, *varied, r.metric, *values])
    return columns, rows


def _mean(runs: Sequence[Row], key: str) -> float | None:
    values = [r.numbers[key] for r in runs if key in r.numbers]
    return statistics.fmean(values) if values else None


def _spread(values: Sequence[float], metric: str) -> str:
    if not values:
        return "–"
    mean = score(statistics.fmean(values), metric)
    if len(values) == 1:
        return mean
    spread = statistics.stdev(values)
    return f"{mean} ± {100 * spread:.2f}" if metric == "accuracy" else f"{mean} ± {spread:.3f}"


def _many(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"
