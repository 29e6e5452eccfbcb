"""The frontier in the terminal: some of its plans, evenly spaced in size, and the one that was chosen."""

from __future__ import annotations

import csv
from pathlib import Path

from rich.console import Console
from rich.table import Table

from hawq_lightning._plan import Plan

_ROWS = 12


def frontier_rows(folder: Path, rows: int = _ROWS) -> list[dict[str, float | bool]]:
    """Points of ``frontier.csv``, smallest first; ``chosen`` marks the one nearest in size to ``plan.json``."""
    with (folder / "frontier.csv").open(newline="", encoding="utf-8") as file:
        points = [
            {k: float(p[k]) for k in ("cost", "omega", "mean_weight_bits", "w_comp")} for p in csv.DictReader(file)
        ]
    size = Plan.load(folder / "plan.json").costs["weight_bytes"]
    nearest = min(range(len(points)), key=lambda i: abs(points[i]["cost"] - size))
    low, high = points[0]["cost"], points[-1]["cost"]
    aims = [low + (high - low) * i / max(rows - 1, 1) for i in range(rows)]
    places = {min(range(len(points)), key=lambda i, aim=aim: abs(points[i]["cost"] - aim)) for aim in aims}  # type: ignore[misc]
    return [{**points[i], "chosen": i == nearest} for i in sorted(places | {nearest})]


def show_frontier(folder: Path) -> None:
    """Print the table; nothing where a given plan made a frontier needless."""
    if not (folder / "frontier.csv").is_file():
        return
    table = Table(title="frontier: no plan is both smaller and less perturbed")
    for heading in ("quantized weights", "smaller", "mean bits", "Omega", ""):
        table.add_column(heading, justify="right")
    for p in frontier_rows(folder):
        table.add_row(
            f"{p['cost'] / 1024:,.1f} KiB", f"{p['w_comp']:.2f}x", f"{p['mean_weight_bits']:.2f}", f"{p['omega']:.3g}",
            "chosen" if p["chosen"] else "",
        )  # fmt: skip
    Console().print(table)
