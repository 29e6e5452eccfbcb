"""The results of ``forecast.py`` as Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy.stats import rankdata, spearmanr

DRAWS, LEVEL = 2000, 0.90  # of the bootstrap over plans
FORECASTS = (
    ("Ω / 2", "omega"),
    ("P, one point", "fast"),
    ("P, three points", "accurate"),
    ("P, 24 random plans", "paths"),
    ("P, mean of the last two", "both"),
)
STAGES = ("quantizing", "batchnorm")
AFTER = tuple(f"after {stage}" for stage in STAGES)
Rows = Sequence[Mapping[str, Any]]


def correlation(rows: Rows, predicted: str, measured: str) -> tuple[float, float]:
    """Spearman's, and the median of measured / predicted."""
    a, b = [r[predicted] for r in rows], [r[measured] for r in rows]
    ratios = [y / x for x, y in zip(a, b) if x > 0]
    return float(spearmanr(a, b).statistic), statistics.median(ratios) if ratios else float("nan")


def gain(rows: Rows, predicted: str, instead: str, measured: str) -> tuple[float, float]:
    """Ends of the bootstrap interval, over plans, of the gain in Spearman's correlation."""
    rng = np.random.default_rng(0)
    table = np.array([[r[predicted], r[instead], r[measured]] for r in rows])
    gains = []
    for _ in range(DRAWS):
        drawn = rankdata(table[rng.integers(0, len(table), len(table))], axis=0)
        with np.errstate(invalid="ignore", divide="ignore"):  # of a few plans all may be the same one
            matrix = np.corrcoef(drawn.T)
        gains.append(matrix[0, 2] - matrix[1, 2])
    low, high = np.nanquantile(gains, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def tables(report: Mapping[str, Any]) -> str:
    """The whole page."""
    lines = [
        "# What rounding costs, forecast and measured", "",
        f"{report['date']}, {report['network']}, {report['images']} images, torch {report['torch']}, "
        f"{report['threads']} threads. Made by `benchmarks/forecast.py`, whose head says how.",
    ]  # fmt: skip
    if report.get("note"):
        lines += ["", report["note"]]
    if report.get("single", {}).get("rows"):
        lines += single_sites(report["single"])
    if report.get("again", {}).get("rows"):
        lines += measured_again(report["again"]["rows"])
    for name, what in (
        ("plans", "of the weights"),
        ("four", "of the weights, 4 bits on average"),
        ("mixed", "of weights and activations (4 bits on average)"),
    ):
        if report.get(name, {}).get("rows") and "forecasts" in report[name]:
            lines += whole_plans(report[name], what, report["plan images"])
    return "\n".join(lines) + "\n"


def single_sites(part: Mapping[str, Any]) -> list[str]:
    """Ω and Q of one site at a time."""
    rows = part["rows"]
    widths = sorted({r["bits"] for r in rows})
    lines = [
        "", "## Single sites", "", "Spearman with the measured KL; median measured / (predicted / 2).", "",
        "| sites | predicted by | " + " | ".join(f"{b} bits" for b in widths) + " |",
        "|---|---|" + "---|" * len(widths),
    ]  # fmt: skip
    for kind in ("weight", "activation"):
        for what, name in (("omega", "Ω"), ("q", "Q")):
            for how in ("all columns", "drawn probes"):
                cells = []
                for bits in widths:
                    some = [r for r in rows if r["kind"] == kind and r["bits"] == bits]
                    rank, ratio = correlation(some, f"{what}, {how}", "measured")
                    cells.append(f"{rank:.3f}; {2 * ratio:.2f}")
                lines.append(f"| {kind}s | {name}, {how} | " + " | ".join(cells) + " |")
    return [*lines, "", "Seconds to measure: " + ", ".join(f"{n} {s:.0f}" for n, s in part["seconds"].items()) + "."]


def measured_again(rows: Rows) -> list[str]:
    """Ω, Q and QB of one weight at a time, with BatchNorm measured again."""
    widths = sorted({r["bits"] for r in rows})
    lines = [
        "", "## Single weights, BatchNorm measured again", "",
        f"{len(rows)} cases. Spearman with the measured KL; median measured / (predicted / 2).", "",
        "| predicted by | " + " | ".join(f"{b} bits" for b in widths) + " |", "|---|" + "---|" * len(widths),
    ]  # fmt: skip
    for what, name in (("omega", "Ω"), ("q", "Q"), ("qb", "QB")):
        found = [correlation([r for r in rows if r["bits"] == bits], what, "measured") for bits in widths]
        lines.append(f"| {name} | " + " | ".join(f"{rank:.3f}; {2 * ratio:.2f}" for rank, ratio in found) + " |")
    return lines


def whole_plans(part: Mapping[str, Any], what: str, images: int) -> list[str]:
    """Ω and P of random plans."""
    rows = [
        r | {f"both, {a}": (r[f"accurate, {a}"] + r[f"paths, {a}"]) / 2 for a in AFTER if f"paths, {a}" in r}
        for r in part["rows"]
    ]
    lines = [
        "", f"## Plans {what}", "",
        f"{len(rows)} random plans, {images} held-out images for the forecast and as many others for the KL. Spearman "
        f"with it; median measured / forecast; {LEVEL:.0%} bootstrap interval, over plans, of the gain in Spearman on "
        "Ω.", "",
        "| mean bits of weights | forecast | right after quantizing | BatchNorm measured again |", "|---|---|---|---|",
    ]  # fmt: skip
    for mean in sorted({r["mean"] for r in rows}):
        some = [r for r in rows if r["mean"] == mean]
        for name, key in FORECASTS:
            cells = []
            for after in STAGES:
                predicted = key if key == "omega" else f"{key}, after {after}"
                if not all(predicted in r and f"after {after}" in r for r in some):
                    cells.append("")
                    continue
                cell = "{:.3f}; {:.2f}".format(*correlation(some, predicted, f"after {after}"))
                if key != "omega":
                    cell += "; {:+.3f} to {:+.3f}".format(*gain(some, predicted, "omega", f"after {after}"))
                cells.append(cell)
            if any(cells):
                lines.append(f"| {mean} | {name} | " + " | ".join(cells) + " |")
    forecasts = part["forecasts"]
    widths = sorted(next(iter(forecasts.values()))["forecast"], key=int)
    lines += [
        "", "Uniform networks on the images of the forecast, forecast / measured (the sum of the shares):", "",
        "| forecast | " + " | ".join(f"{b} bits" for b in widths) + " |", "|---|" + "---|" * len(widths),
    ]  # fmt: skip
    for name, made in forecasts.items():
        cells = [f"{made['forecast'][b]:.3g} / {made['measured'][b]:.3g}" for b in widths]
        lines.append(f"| {name} ({made['seconds']:.0f} s) | " + " | ".join(cells) + " |")
    starts = [made["start"] for made in forecasts.values() if made.get("start")]
    if starts:
        lines += ["", f"New statistics of the float network alone: {starts[0]:.3g}, a part of the forecast."]
    return lines
