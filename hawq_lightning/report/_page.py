"""report.html: one page without anything from outside, and the same figures as PNG and CSV."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from hawq_lightning._errors import HawqError
from hawq_lightning._io import write_text
from hawq_lightning.report import _export_section as export_section
from hawq_lightning.report import _summary as summary
from hawq_lightning.report._checks import draw_loss_check, draw_training
from hawq_lightning.report._landscape import draw_landscape
from hawq_lightning.report._run import Run, read_run
from hawq_lightning.report._site_figures import draw_bits, draw_traces
from hawq_lightning.report._style import ReportFigure
from hawq_lightning.report._tradeoff import draw_frontier

# figure -> the file that it needs
SECTIONS = (
    (draw_frontier, "frontier.csv", "What a smaller file costs"),
    (draw_bits, "plan.json", "Bits along the network"),
    (draw_traces, "sensitivity.json", "How sensitive each site is"),
    (draw_loss_check, "loss_check.csv", "Does the prediction hold?"),
    (draw_training, "metrics.json", "Through fine-tuning"),
    (draw_landscape, "figures/landscape.csv", "The loss around the trained weights"),
)
_ON_REQUEST = ("figures/landscape.csv",)  # nobody misses it when it was not asked for
_MOST_ROWS = 300  # of a table on the page; the CSV has all


def write_report(folder: str | Path, *, title: str | None = None) -> Path:
    """Write ``report.html`` and ``figures/*.png`` with their CSV from what a run folder holds.

    Args:
        folder: with any of plan.json, sensitivity.json, frontier.csv, metrics.json, loss_check.csv. What is missing or
            damaged leaves its section out, with a sentence.
        title: heading; the folder's name otherwise.

    Returns:
        Path of the page.

    Raises:
        HawqError: no such folder, nothing in it to report, or it cannot be written to.
    """
    run = read_run(folder)
    drawings, absent = draw_all(run)
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    metric, _ = run.metric
    page = environment.from_string(resource("template.html")).render(
        title=title or f"{run.folder.resolve().name}",
        style=Markup(resource("style.css")),
        script=Markup(resource("script.js")),
        headline=summary.headline(run),
        summary=summary.summary(run),
        metric=metric,
        accuracy=summary.accuracy_rows(run),
        sizes=summary.size_rows(run),
        figures=[on_page(d) for d in drawings],
        outside=export_section.sentences(run),
        speed=(export_section.SPEED_COLUMNS, export_section.speed_rows(run), export_section.speed_note(run)),
        absent=absent,
        doubts=summary.doubts(run),
        settings=summary.settings(run),
    )
    path = run.folder / "report.html"
    try:
        for drawing in drawings:
            drawing.save(run.folder / "figures")
        write_text(path, page)
    except OSError as error:
        raise HawqError(f"Cannot write the report to {run.folder}: {error.strerror or error}.") from error
    return path


def draw_all(run: Run) -> tuple[list[ReportFigure], list[tuple[str, str]]]:
    """The figures that the run has data for; and title and reason of those that it has not."""
    drawings, absent = [], []
    for draw, needs, title in SECTIONS:
        drawing = draw(run)
        if drawing:
            drawings.append(drawing)
        elif needs not in _ON_REQUEST or (run.folder / needs).is_file():
            absent.append((title, run.missing.get(needs, f"{needs} holds too little for this figure.")))
    return drawings, absent


def on_page(drawing: ReportFigure) -> dict[str, object]:
    rows = [[str(cell) for cell in row] for row in drawing.rows]
    return {
        "name": drawing.name,
        "title": drawing.title,
        "caption": drawing.caption,
        "alt": drawing.alt,
        "svg": Markup(drawing.svg()),
        "csv": drawing.csv_uri(),
        "columns": drawing.columns,
        "rows": rows[:_MOST_ROWS],
        "more": max(0, len(rows) - _MOST_ROWS),
    }


def resource(name: str) -> str:
    return resources.files("hawq_lightning.report").joinpath(name).read_text(encoding="utf-8")
