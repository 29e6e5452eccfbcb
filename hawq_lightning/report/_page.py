"""report.html: one page without anything from outside, and the same figures as PNG and CSV."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from types import MappingProxyType

from hawq_lightning._errors import HawqError
from hawq_lightning._io import write_text
from hawq_lightning.report import _export_section as export_section
from hawq_lightning.report import _summary as summary
from hawq_lightning.report._checks import draw_loss_check, draw_training
from hawq_lightning.report._figure import ReportFigure
from hawq_lightning.report._landscape import draw_landscape
from hawq_lightning.report._outlook_figure import draw_outlook
from hawq_lightning.report._run import Run, read_run
from hawq_lightning.report._site_figures import draw_bits, draw_traces
from hawq_lightning.report._tradeoff import draw_frontier

try:
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup
except ImportError as error:
    raise HawqError(f"Report pages need jinja2 ({error}): pip install jinja2.") from error

Table = tuple[Sequence[str], Sequence[Sequence[object]]]

# figure -> the file that it needs
SECTIONS = (
    (draw_outlook, "forecast.json", "What a size costs, before it is tried"),
    (draw_frontier, "frontier.csv", "What smaller weights cost"),
    (draw_bits, "plan.json", "Bits along the network"),
    (draw_traces, "sensitivity.json", "How sensitive each site is"),
    (draw_loss_check, "loss_check.csv", "Does the prediction hold?"),
    (draw_training, "metrics.json", "Through fine-tuning"),
    (draw_landscape, "figures/landscape.csv", "The loss around the trained weights"),
)
_ON_REQUEST = ("figures/landscape.csv", "forecast.json")  # nobody misses it when it was not asked for
_MOST_ROWS = 300  # of a table on the page; the CSV has all


def write_report(folder: str | Path, *, title: str | None = None) -> Path:
    """Write ``report.html`` and ``figures/*.png`` with their CSV from what a run folder holds.

    Args:
        folder: with any of plan.json, sensitivity.json, frontier.csv, forecast.json, metrics.json,
            loss_check.csv. What is missing or
            damaged leaves its section out, with a sentence.
        title: heading; the folder's name otherwise.

    Returns:
        Path of the page.

    Raises:
        HawqError: no such folder, nothing in it to report, or it cannot be written to.
    """
    run = read_run(folder)
    figures, absent = draw_all(run)
    metric, _ = run.metric
    page = render(
        kind="Mixed-precision quantization by Hessian traces",
        title=title or run.folder.resolve().name,
        summary=summary.summary(run),
        headline=summary.headline(run),
        metric=metric,
        accuracy=summary.accuracy_rows(run),
        sizes=summary.size_rows(run),
        figures=figures,
        onnx=export_section.sentences(run),
        speed=(export_section.SPEED_COLUMNS, export_section.speed_rows(run), export_section.speed_note(run)),
        doubts=summary.doubts(run),
        left_out=("Not in this report", absent),
        settings=summary.settings(run),
        footer="Ω is the second-order perturbation of the HAWQ-V2 paper (its equation 10). Sizes in KiB and MiB are "
        "powers of 1024.",
    )
    path = run.folder / "report.html"
    try:
        for figure in figures:
            figure.save(run.folder / "figures")
        write_text(path, page)
    except OSError as error:
        raise HawqError(f"Cannot write the report to {run.folder}: {error.strerror or error}.") from error
    return path


def draw_all(run: Run) -> tuple[list[ReportFigure], list[tuple[str, str]]]:
    """The figures that the run has data for; and title and reason of those that it has not."""
    figures, absent = [], []
    for draw, needs, title in SECTIONS:
        figure = draw(run)
        if figure:
            figures.append(figure)
        elif needs not in _ON_REQUEST or (run.folder / needs).is_file():
            absent.append((title, run.missing.get(needs, f"{needs} holds too little for this figure.")))
    return figures, absent


def render(
    *,
    figures: Sequence[ReportFigure],
    tables: Mapping[str, Table] = MappingProxyType({}),
    **parts: object,
) -> str:
    """A page of its own: no part of it comes from elsewhere.

    Args:
        figures: drawn one below the other, each with words, table and CSV.
        tables: heading -> columns and rows, below the figures.
        **parts: ``kind``, ``title``, ``summary``, ``left_out`` (heading, rows) and ``footer``; the other sections of
            template.html are left out unless given.
    """
    files = resources.files("hawq_lightning.report")
    template, style = (files.joinpath(name).read_text(encoding="utf-8") for name in ("template.html", "style.css"))
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(template).render(
        style=Markup(style),
        figures=[_section(f) for f in figures],
        tables={heading: _filled(*table) for heading, table in tables.items()},
        **parts,
    )


def _filled(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> Table:
    """The table without columns that are empty in every row."""
    places = [i for i in range(len(columns)) if any(r[i] not in ("", "–") for r in rows)]
    return [columns[i] for i in places], [[r[i] for i in places] for r in rows]


def _section(figure: ReportFigure) -> dict[str, object]:
    columns, rows = _filled(figure.columns, figure.rows)
    return {
        "name": figure.name,
        "title": figure.title,
        "caption": figure.caption,
        "alt": figure.alt,
        "svg": Markup(figure.svg()),
        "csv": figure.csv_uri(),
        "columns": columns,
        "rows": rows[:_MOST_ROWS],
        "more": max(0, len(rows) - _MOST_ROWS),
    }
