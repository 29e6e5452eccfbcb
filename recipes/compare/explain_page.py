"""The page and the picture of ``explain.py``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from scipy.stats import spearmanr

from hawq_lightning.report import BLUE, GREEN, ORANGE, SOFT, ReportFigure, canvas, log_scale, markdown_table

STAGES = {"quantized": "after quantizing", "norm": "norms restored", "batchnorm": "BatchNorm measured again",
          "trained": "after {} steps"}  # fmt: skip
PREDICTORS = {
    "omega": "Ω, mean trace · ‖ΔW‖²", "l2": "‖ΔW‖²", "eigenvalue": "λ₁ ‖ΔW‖²",
    "alone": "loss changes measured one by one", "two": "share of weights with the fewest bits",
}  # fmt: skip


def tables(found: Mapping[str, Any], settings: Mapping[str, str], steps: int) -> list[str]:
    """The page: correlations, spread, methods, curves."""
    names = {k: v.format(steps) for k, v in STAGES.items()}
    text = ["# What a prediction is worth before and after fine-tuning", ""]
    for setting, label in settings.items():
        rows = {k.split("/")[2]: v for k, v in found.items() if k.startswith(f"{setting}/plan/")}
        drawn = [v for k, v in rows.items() if k.startswith("random")]
        losses = {s: [r[s]["loss"] for r in drawn] for s in names}
        cells = []
        for key, title in PREDICTORS.items():
            if all(key in r["said"] for r in drawn):
                ranks = [spearmanr([r["said"][key] for r in drawn], losses[s]) for s in names]
                cells.append([title, *(f"{float(r.statistic):.2f} (p {float(r.pvalue):.2g})" for r in ranks)])
        own = [float(spearmanr(losses["quantized"], losses[s]).statistic) for s in names]
        cells.append(["the loss after quantizing itself", *(f"{v:.2f}" for v in own)])
        cells.append(["(standard deviation of the loss)", *(f"{np.std(losses[s], ddof=1):.4f}" for s in names)])
        text += [
            f"## {label}",
            "",
            f"Spearman's rank correlation with the held-out loss of {len(drawn)} random plans:",
            "",
        ]
        text += [*markdown_table(["predictor", *names.values()], cells), ""]
        again = [v[-1] for k, v in found.items() if k.startswith(f"{setting}/seed/")]
        if len(again) > 1:
            loss, accuracy = (np.std([r[k] for r in again], ddof=1) for k in ("loss", "accuracy"))
            text += [f"One plan, {len(again)} seeds, {names['trained']}: standard deviation of the loss {loss:.4f}, "
                     f"of the accuracy {100 * accuracy:.2f} points.", ""]  # fmt: skip
        shown = [[name, *(_shown(r[s]) for s in names)] for name, r in rows.items()]
        text += [*markdown_table(["plan", *names.values()], shown), ""]
        curves = {k.split("/")[2]: v for k, v in found.items() if k.startswith(f"{setting}/curve/")}
        if curves:
            marks = [str(p["step"]) for p in next(iter(curves.values()))]
            shown = [[k, *(f"{100 * p['accuracy']:.1f}%" for p in v)] for k, v in curves.items()]
            text += ["Held-out accuracy during the whole fine-tuning, by step:", ""]
            text += [*markdown_table(["plan", *marks], shown), ""]
    return text


def draw(found: Mapping[str, Any], settings: Mapping[str, str], steps: int) -> ReportFigure:
    """Ω against the held-out loss of random plans at each stage."""
    colours = {"quantized": BLUE, "norm": GREEN, "batchnorm": SOFT, "trained": ORANGE}
    rows: list[list[Any]] = []
    with canvas(len(settings), 3.4 * len(settings)) as (figure, axes):
        for ax, (setting, label) in zip(axes, settings.items()):
            plans = {k.split("/")[2]: v for k, v in found.items() if k.startswith(f"{setting}/plan/")}
            for stage, title in STAGES.items():
                points = [(r["said"]["omega"], r[stage]["loss"]) for r in plans.values()]
                ax.plot(*zip(*points), "o", color=colours[stage], markersize=5, alpha=0.8, label=title.format(steps))
                rows += [[setting, name, stage, r["said"]["omega"], r[stage]["loss"]] for name, r in plans.items()]
            ax.set_title(label)
            ax.set_ylabel("held-out loss")
            log_scale(ax, "y")
            ax.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
        axes[-1].set_xlabel("Ω of the weights", color=SOFT)
    columns = ["setting", "plan", "stage", "omega", "loss"]
    return ReportFigure("explain", "Predicted, and what is left of it", "", "", figure, columns, rows)


def _shown(found: Mapping[str, float]) -> str:
    return f"{found['loss']:.3f} ({100 * found['accuracy']:.1f}%)"
