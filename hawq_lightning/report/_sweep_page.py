"""The table and the picture of a sweep: sweep.html, sweep.md, sweep.csv and figures/accuracy_size.png."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle
from pathlib import Path

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.ticker import PercentFormatter

from hawq_lightning._errors import HawqError
from hawq_lightning._io import write_text
from hawq_lightning.report._card import markdown_table, markdown_text
from hawq_lightning.report._page import on_page, resource
from hawq_lightning.report._style import BLUE, GREEN, ORANGE, PURPLE, SOFT, ReportFigure, Tooltip, canvas, csv_text
from hawq_lightning.report._sweep import Row, Sweep, mean_and_spread, read_sweep
from hawq_lightning.report._text import plain, score, size, times

NUMBERS = ("w_comp", "weight_bytes", "file_bytes", "bops", "seconds")
_STAGES = ("float", "quantized", "fine_tuned")
_LOOKS = ((BLUE, "o"), (ORANGE, "s"), (GREEN, "^"), (PURPLE, "D"))
_MOST_CURVES = 8  # that a legend can name
_LONGEST = 28  # label, in letters


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
    drawing = draw_sweep(sweep)
    title = f"Sweep: {sweep.folder.resolve().name}" if len({r.title for r in sweep.rows}) != 1 else sweep.rows[0].title
    summary = sweep_facts(sweep)
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    page = environment.from_string(resource("sweep.html")).render(
        title=title,
        style=Markup(resource("style.css")),
        script=Markup(resource("script.js")),
        summary=summary,
        figure=on_page(drawing) if drawing else None,
        means=_filled(*mean_table(sweep)),
        runs=_filled(*run_table(sweep)),
        left_out=sweep.left_out,
    )
    card = [f"# {markdown_text(title)}", "", markdown_text(summary), "", "## Mean over seeds", ""]
    card += [*markdown_table(*mean_table(sweep)), "", "## Runs", "", *markdown_table(*run_table(sweep)), ""]
    if sweep.left_out:
        card += ["## Left out", "", *markdown_table(["run", "why"], list(sweep.left_out.items())), ""]
    try:
        if drawing:
            drawing.save(target / "figures")
        write_text(target / "sweep.csv", csv_text(*raw_table(sweep)))
        write_text(target / "sweep.md", "\n".join(card))
        write_text(target / "sweep.html", page)
    except OSError as error:
        raise HawqError(f"Cannot write to {target}: {error.strerror or error}.") from error
    return sweep


def sweep_facts(sweep: Sweep) -> str:
    """One sentence: how many runs, settings and seeds; and how many are missing."""
    seeds = len({r.seed for r in sweep.rows})
    text = (
        f"{_many(len(sweep.rows), 'finished run')} of {_many(len(sweep.groups()), 'setting')}, {_many(seeds, 'seed')}."
    )
    return text + (f" {_many(len(sweep.left_out), 'run')} left out." if sweep.left_out else "")


def raw_table(sweep: Sweep) -> tuple[list[str], list[list[object]]]:
    """Every run with all digits, for other programs."""
    columns = ["run", "name", "seed", "selector", "budget", *sweep.varied, "metric", *_STAGES, *NUMBERS]
    rows: list[list[object]] = []
    for r in sweep.rows:
        varied = [r.overrides.get(k, "") for k in sweep.varied]
        scores = [r.scores.get(s, "") for s in _STAGES]
        numbers = [r.numbers.get(n, "") for n in NUMBERS]
        rows.append([r.name, r.title, r.seed, r.selector, r.budget, *varied, r.metric, *scores, *numbers])
    return columns, rows


def run_table(sweep: Sweep) -> tuple[list[str], list[list[str]]]:
    """Every run, for people."""
    columns = ["name", "selector", "budget", *sweep.varied, "seed", "metric", "float", "after quantizing",
               "after fine-tuning", "smaller", "weights", "file", "time"]  # fmt: skip
    rows = []
    for r in sweep.rows:
        n = r.numbers
        seconds = "–" if "seconds" not in n else f"{n['seconds']:.0f} s"
        rows.append(
            [r.title, r.selector, r.budget, *(r.overrides.get(k, "") for k in sweep.varied), r.seed, r.metric]
            + [score(r.scores.get(s), r.metric) for s in _STAGES]
            + [times(n.get("w_comp")), size(n.get("weight_bytes")), size(n.get("file_bytes")), seconds]
        )
    return columns, rows


def mean_table(sweep: Sweep) -> tuple[list[str], list[list[str]]]:
    """Every setting: mean and standard deviation over its seeds."""
    columns = ["name", "selector", "budget", *(["also"] if sweep.varied else []), "seeds", "metric", "float",
               "after fine-tuning", "smaller", "weights"]  # fmt: skip
    rows = []
    for setting, runs in sweep.groups().items():
        title, selector, budget, metric, *varied = setting
        w_comp, weight_bytes = _mean(runs, "w_comp"), _mean(runs, "weight_bytes")
        scores = [_spread([r.scores["float"] for r in runs if "float" in r.scores], metric)]
        scores += [_spread([r.score for r in runs if r.score is not None], metric)]
        also = [", ".join(varied)] if sweep.varied else []
        sizes = [times(w_comp), size(weight_bytes)]
        rows.append([title, selector, budget, *also, str(len(runs)), metric, *scores, *sizes])
    return columns, rows


def draw_sweep(sweep: Sweep) -> ReportFigure | None:
    """Accuracy against the size of the weights: a faint mark a run, a line through the means of each selector."""
    metric = sweep.rows[0].metric
    runs = [r for r in sweep.rows if r.metric == metric and r.score is not None and r.numbers.get("weight_bytes")]
    if not runs:
        return None
    largest = max(r.numbers["weight_bytes"] for r in runs)
    unit, unit_name = (1024, "KiB") if largest < 4 << 20 else (1 << 20, "MiB")
    hits: list[Tooltip] = []
    with canvas(1, 4.4) as (figure, axes):
        ax = axes[0]
        curves = _curves(sweep, runs)
        for (label, groups), (colour, marker) in zip(curves.items(), cycle(_LOOKS)):
            name = _short(label) if len(curves) <= _MOST_CURVES else None
            _draw_curve(ax, groups, colour, marker, name, unit)
            for r in (r for g in groups for r in g):
                text = (
                    f"{label}\n{r.budget}, seed {r.seed}\n{size(r.numbers['weight_bytes'])}, {score(r.score, metric)}"
                )
                hits.append(Tooltip(ax, r.numbers["weight_bytes"] / unit, r.score or 0.0, text))
        floats = [r.scores["float"] for r in runs if "float" in r.scores]
        if floats:
            ax.axhline(mean_and_spread(floats)[0], color=SOFT, linestyle=(0, (6, 3)), linewidth=1.4, label="float")
        ax.set_xlabel(f"size of the quantized weights ({unit_name})", color=SOFT)
        ax.set_ylabel(metric, color=SOFT)
        if metric == "accuracy":
            ax.yaxis.set_major_formatter(PercentFormatter(1))
        ax.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=4, borderaxespad=0.3)
    lower = metric == "loss"
    best = (min if lower else max)(runs, key=lambda r: r.score or 0.0)
    smallest = min(r.numbers["weight_bytes"] for r in runs)
    return ReportFigure(
        "accuracy_size",
        f"{metric[0].upper()}{metric[1:]} against size",
        f"{len(runs)} runs between {size(smallest)} and {size(largest)} of weights; "
        f"the {'lowest' if lower else 'highest'} {metric} is {score(best.score, metric)} at "
        f"{size(best.numbers['weight_bytes'])}.",
        "A faint mark is one run; lines go through the means over seeds. The dashed line is the float network.",
        figure,
        ["name", "selector", "budget", "seed", "weight_bytes", metric],
        [[r.title, r.selector, r.budget, r.seed, f"{r.numbers['weight_bytes']:g}", f"{r.score:.6g}"] for r in runs],
        hits,
    )


def _curves(sweep: Sweep, runs: Sequence[Row]) -> dict[str, list[list[Row]]]:
    """Label -> its groups of seeds, small to large: one curve for each setting without its budget."""
    titles = len({r.title for r in runs}) > 1
    found: dict[str, list[list[Row]]] = {}
    for setting, group in sweep.groups().items():
        title, selector, _, _, *varied = setting
        kept = [r for r in group if r in runs]
        label = ", ".join([*([title] if titles else []), selector or "plan", *varied])
        if kept:
            found.setdefault(label, []).append(kept)
    return {k: sorted(v, key=lambda g: _mean(g, "weight_bytes") or 0.0) for k, v in found.items()}


def _draw_curve(
    ax: Axes, groups: Sequence[Sequence[Row]], colour: str, marker: str, label: str | None, unit: int
) -> None:
    xs = [(_mean(g, "weight_bytes") or 0.0) / unit for g in groups]
    ys = [mean_and_spread([r.score for r in g if r.score is not None])[0] for g in groups]
    ax.plot(xs, ys, marker=marker, color=colour, markersize=7, label=label, zorder=4)
    every = [r for g in groups for r in g]
    ax.plot(
        [r.numbers["weight_bytes"] / unit for r in every], [r.score or 0.0 for r in every],
        marker, color=colour, alpha=0.4, markersize=4, zorder=3,
    )  # fmt: skip


def _filled(columns: list[str], rows: list[list[str]]) -> tuple[list[str], list[list[str]]]:
    """Without the columns that say nothing in any row."""
    kept = [i for i in range(len(columns)) if any(r[i] not in ("", "–") for r in rows)]
    return [columns[i] for i in kept], [[r[i] for i in kept] for r in rows]


def _mean(runs: Sequence[Row], key: str) -> float | None:
    known = [r.numbers[key] for r in runs if key in r.numbers]
    return mean_and_spread(known)[0] if known else None


def _spread(values: Sequence[float], metric: str) -> str:
    if not values:
        return "–"
    mean, spread = mean_and_spread(values)
    if spread is None:
        return score(mean, metric)
    return f"{score(mean, metric)} ± {100 * spread:.2f}" if metric == "accuracy" else f"{mean:.3f} ± {spread:.3f}"


def _short(label: str) -> str:
    return label if len(label) <= _LONGEST else label[: _LONGEST - 1] + "…"


def _many(count: int, what: str) -> str:
    return f"{plain(count)} {what}{'' if count == 1 else 's'}"
