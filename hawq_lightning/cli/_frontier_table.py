"""The frontier in the terminal: some of its plans, evenly spaced in size, and the one that was chosen."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console
from rich.table import Table

from hawq_lightning._plan import Plan
from hawq_lightning.selection import Outlook

_ROWS = 12
_SIZES = (4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 32)  # times smaller


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


def size_lines(folder: Path) -> list[str]:
    """``8x: KL 0.004, 99.4% of the predictions unchanged``, a line a size, from the columns of ``frontier.csv``.

    Each is the largest plan of the frontier that is so many times smaller; empty where nothing was forecast.
    """
    with (folder / "frontier.csv").open(newline="", encoding="utf-8") as file:
        points = list(csv.DictReader(file))
    if not points or not {"kl", "kl_batchnorm"} & points[0].keys():
        return []
    lines = []
    for times in _SIZES:
        fitting = [p for p in points if float(p["w_comp"]) >= times]
        if fitting and times >= math.floor(float(points[-1]["w_comp"])):
            best = max(fitting, key=lambda p: float(p["cost"]))
            parts = [_expected(best, ""), _expected(best, "_batchnorm")]
            lines.append(f"{times}x: " + "; with BatchNorm measured again ".join(p for p in parts if p))
    return lines


def _expected(point: Mapping[str, str], suffix: str) -> str:
    """What is expected of a plan, in words."""
    kl, changed = point.get(f"kl{suffix}"), point.get(f"changed{suffix}")
    if not kl:
        return ""
    if not changed:
        return f"squared error {float(kl):.2g} of the outputs' variance"
    return f"KL {float(kl):.2g}, {100 * (1 - float(changed)):.4g}% of the predictions unchanged"


def show_outlook(folder: Path) -> None:
    """Print :func:`size_lines` and how good they are; nothing where nothing was forecast."""
    if not (folder / "frontier.csv").is_file() or not (lines := size_lines(folder)):
        return
    print("expected of the network right after quantizing, before any fine-tuning:")
    for line in lines:
        print(f"  {line}")
    if (folder / "forecast.json").is_file():
        print(Outlook.load(folder / "forecast.json").quality())


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
