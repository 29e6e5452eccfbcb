"""One drawing, two outputs: PNG and inline SVG, both plain matplotlib in dark ink for a white ground.

Colours are Okabe and Ito's, which people with any colour vision can tell apart; marker shapes say the same again.
"""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from hawq_lightning._csv import csv_text
from hawq_lightning._errors import HawqError
from hawq_lightning._io import write_bytes, write_text

try:
    import matplotlib
    from matplotlib.axes import Axes
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogFormatter
except ImportError as error:
    raise HawqError(f"Figures need matplotlib ({error}): pip install matplotlib.") from error

INK, SOFT, GRID, PAPER = "#1b2430", "#5b6673", "#dde2e7", "#fefefe"
BLUE, ORANGE, GREEN, PURPLE = "#0072b2", "#d55e00", "#009e73", "#cc79a7"
_RC: dict[Any, Any] = {
    "svg.fonttype": "none", "text.parse_math": False, "figure.dpi": 72, "figure.facecolor": "none",
    "axes.facecolor": "none", "axes.edgecolor": SOFT, "axes.labelcolor": INK, "axes.titlecolor": INK,
    "axes.grid": True, "axes.axisbelow": True, "grid.color": GRID, "grid.linewidth": 0.8, "text.color": INK,
    "xtick.color": SOFT, "ytick.color": SOFT, "xtick.labelcolor": INK, "ytick.labelcolor": INK, "font.size": 11,
    "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False, "axes.titlesize": 11,
    "axes.titlelocation": "left", "axes.titleweight": "bold", "font.family": "DejaVu Sans", "lines.linewidth": 1.8,
}  # fmt: skip
_PNG_DPI = 180


@dataclass(frozen=True)
class Tooltip:
    """A text that the browser shows over a mark, at data coordinates of its axes."""

    axes: Axes
    x: float
    y: float
    text: str


@dataclass(frozen=True)
class ReportFigure:
    """A figure with all that belongs to it.

    Attributes:
        name: file stem.
        title: heading above.
        alt: what it shows, for those who do not see it; with the numbers that matter.
        caption: how to read it.
        figure: the drawing.
        columns: of the table behind it.
        rows: of the table behind it.
        tooltips: texts of the marks.
    """

    name: str
    title: str
    alt: str
    caption: str
    figure: Figure
    columns: Sequence[str]
    rows: Sequence[Sequence[object]]
    tooltips: Sequence[Tooltip] = field(default_factory=list)

    def png(self) -> bytes:
        """On white, for slides and papers."""
        buffer = io.BytesIO()
        with matplotlib.rc_context(_RC):
            self.figure.savefig(buffer, format="png", dpi=_PNG_DPI, facecolor="white", metadata={"Software": None})
        return buffer.getvalue()

    def svg(self) -> str:
        """Inline SVG with its alternative text and tooltips."""
        buffer = io.StringIO()
        with matplotlib.rc_context(_RC | {"svg.hashsalt": self.name}):
            self.figure.draw_without_rendering()
            self.figure.set_layout_engine("none")  # else savefig moves the axes away from under the tooltips
            metadata = {"Date": None, "Creator": None, "Format": None, "Type": None}
            self.figure.savefig(buffer, format="svg", metadata=metadata)
        body = buffer.getvalue().partition("<svg")[2].partition(">")[2]
        # matplotlib numbers its groups alike in every file, and an id may stand only once on a page
        body = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{self.name}-", body).replace("xlink:href", "href")
        width, height = self.figure.get_size_inches() * 72
        opening = f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{escape(self.alt)}" class="plot">'
        return opening + body.replace("</svg>", "".join(self._title_elements(height)) + "</svg>")

    def _title_elements(self, height: float) -> Iterator[str]:
        for tip in self.tooltips:
            x, y = tip.axes.transData.transform((tip.x, tip.y)) / self.figure.dpi * 72
            title = escape(tip.text)
            yield f'<circle cx="{x:.1f}" cy="{height - y:.1f}" r="7" class="tip"><title>{title}</title></circle>'

    def csv(self) -> str:
        """The numbers behind it."""
        return csv_text(self.columns, self.rows)

    def csv_uri(self) -> str:
        """The table as a link that needs no file beside the page."""
        return "data:text/csv;base64," + base64.b64encode(self.csv().encode()).decode()

    def save(self, folder: Path) -> None:
        """Write PNG and CSV."""
        write_bytes(folder / f"{self.name}.png", self.png())
        write_text(folder / f"{self.name}.csv", self.csv())


def log_scale(ax: Axes, *names: str) -> None:
    """Log scales (``x``, ``y``) labelled in plain text: the default's ``$10^{-3}$`` is an image of glyphs in SVG."""
    for name in names:
        axis = ax.xaxis if name == "x" else ax.yaxis
        ax.set(**{f"{name}scale": "log"})
        axis.set_major_formatter(LogFormatter())
        # an axis with one power of ten or none shows too few powers of ten to be read
        axis.set_minor_formatter(LogFormatter(minor_thresholds=(1, 0.5)))


@contextmanager
def canvas(rows: int = 1, height: float = 3.6, **options: Any) -> Iterator[tuple[Figure, list[Axes]]]:
    """A figure in the page's style with ``rows`` axes one below the other; height in inches."""
    with matplotlib.rc_context(_RC):
        figure = Figure(figsize=(9, height), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(rows, 1, squeeze=False, **options)[:, 0]
        yield figure, list(axes)
