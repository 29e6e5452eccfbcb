"""One drawing, two outputs: a PNG on white, and an inline SVG whose colours follow the page's light or dark theme.

Colours are Okabe and Ito's, which people with any colour vision can tell apart; marker shapes say the same again.
"""

from __future__ import annotations

import base64
import csv
import io
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from html import escape
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

INK, SOFT, GRID, PAPER = "#1b2430", "#5b6673", "#dde2e7", "#fefefe"
BLUE, ORANGE, GREEN, PURPLE = "#0072b2", "#d55e00", "#009e73", "#cc79a7"
# in the SVG these become the page's custom properties
_THEME = {
    INK: "var(--ink)", SOFT: "var(--soft)", GRID: "var(--grid)", PAPER: "var(--paper)",
    BLUE: "var(--blue)", ORANGE: "var(--orange)", GREEN: "var(--green)", PURPLE: "var(--purple)",
}  # fmt: skip
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
    """A spot that shows a text on hover, in data coordinates of its axes."""

    axes: Axes
    x: float
    y: float
    text: str
    bits: Sequence[int] = ()


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
        hits: hover texts.
    """

    name: str
    title: str
    alt: str
    caption: str
    figure: Figure
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    hits: Sequence[Tooltip] = field(default_factory=list)

    def png(self) -> bytes:
        """On white, for slides and papers."""
        buffer = io.BytesIO()
        with matplotlib.rc_context(_RC):
            self.figure.savefig(buffer, format="png", dpi=_PNG_DPI, facecolor="white", metadata={"Software": None})
        return buffer.getvalue()

    def svg(self) -> str:
        """Inline SVG that follows the page's theme, with its hover spots."""
        buffer = io.StringIO()
        with matplotlib.rc_context(_RC | {"svg.hashsalt": self.name}):
            self.figure.draw_without_rendering()
            self.figure.set_layout_engine("none")  # what the spots are computed from is what is drawn
            metadata = {"Date": None, "Creator": None, "Format": None, "Type": None}
            self.figure.savefig(buffer, format="svg", metadata=metadata)
        text = buffer.getvalue()
        text = text[text.index("<svg") :]
        text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
        # the same id must not stand twice on the page
        text = re.sub(r'\bid="([^"]+)"', rf'id="{self.name}-\1"', text)
        text = re.sub(r"url\(#([^)]+)\)", rf"url(#{self.name}-\1)", text)
        text = re.sub(r'xlink:href="#([^"]+)"', rf'href="#{self.name}-\1"', text)
        text = re.sub(r' xmlns:xlink="[^"]*"', "", text)
        for colour, variable in _THEME.items():
            text = text.replace(colour, variable)
        width, height = self.figure.get_size_inches() * 72
        opening = f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{escape(self.alt)}" class="plot">'
        text = opening + text[text.index(">") + 1 :]
        spots = "".join(self._spots(height))
        return text[: text.rindex("</svg>")] + f'<g class="hits">{spots}</g></svg>'

    def _spots(self, height: float) -> Iterator[str]:
        for hit in self.hits:
            x, y = hit.axes.transData.transform((hit.x, hit.y)) / self.figure.dpi * 72
            bars = f' data-bits="{",".join(map(str, hit.bits))}"' if hit.bits else ""
            yield f'<circle cx="{x:.1f}" cy="{height - y:.1f}" r="7"{bars}><title>{escape(hit.text)}</title></circle>'

    def csv(self) -> str:
        """The numbers behind it."""
        return csv_text(self.columns, self.rows)

    def csv_uri(self) -> str:
        """The table as a link that needs no file beside the page."""
        return "data:text/csv;base64," + base64.b64encode(self.csv().encode()).decode()

    def save(self, folder: Path) -> None:
        """Write PNG and CSV."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{self.name}.png").write_bytes(self.png())
        (folder / f"{self.name}.csv").write_text(self.csv(), encoding="utf-8")


def csv_text(columns: Sequence[Any], rows: Sequence[Sequence[Any]]) -> str:
    """CSV whose texts no spreadsheet takes for formulas."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerows([_harmless(cell) for cell in row] for row in (columns, *rows))
    return buffer.getvalue()


def _harmless(cell: Any) -> Any:
    if not isinstance(cell, str) or not cell.lstrip().startswith(("=", "+", "-", "@")):
        return cell
    try:
        float(cell)
    except ValueError:
        return "'" + cell
    return cell


def log_scale(ax: Axes, *names: str) -> None:
    """Log scales (``x``, ``y``) with powers of ten as plain text, which every viewer shows alike."""
    for name in names:
        axis = ax.xaxis if name == "x" else ax.yaxis
        ax.set(**{f"{name}scale": "log"})
        axis.set_major_formatter(FuncFormatter(_power))
        axis.set_minor_formatter(FuncFormatter(partial(_between, axis)))


def _between(axis: Axis, value: float, _: Any = None) -> str:
    """Twos and fives, or all digits, on an axis that shows too few powers of ten to be read."""
    low, high = sorted(map(float, axis.get_view_interval()))
    if low <= 0 or math.floor(math.log10(high)) > math.ceil(math.log10(low)):
        return ""
    digit = value / 10 ** math.floor(math.log10(value) + 1e-9)
    if round(digit) not in ((2, 5) if high > 4 * low else range(2, 10)):
        return ""
    return f"{value:g}" if 1e-3 <= value < 1e4 else f"{digit:.0f}·{_power(value / round(digit))}"


def _power(value: float, _: Any = None) -> str:
    exponent = round(math.log10(value)) if value > 0 else 0
    if 0 <= exponent <= 3:
        return f"{10**exponent}"
    return "10" + str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


@contextmanager
def canvas(rows: int = 1, height: float = 3.6, **options: Any) -> Iterator[tuple[Figure, list[Axes]]]:
    """A figure in the page's style with ``rows`` axes one below the other; height in inches."""
    with matplotlib.rc_context(_RC):
        figure = Figure(figsize=(9, height), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(rows, 1, squeeze=False, **options)[:, 0]
        yield figure, list(axes)
