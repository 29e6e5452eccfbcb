"""Lemma 1 and Assumption 1 put to the test: half of Ω against the measured change of the loss, site by site.

    python benchmarks/prediction.py --data CIFAR10_FOLDER --weights RESNET20.pt [--images 512] [--draws 1]

ResNet20 on CIFAR-10, evaluation mode, the same training images for traces, eigenvalues and losses. Three experiments:

1. *Quantization*: every site at every width, alone. Predicted ½Ω; measured loss change; beside it the two rivals
   ‖ΔW‖² (L2) and λ₁‖ΔW‖² (top eigenvalue).
2. *Isotropic noise of the same norm*: what Assumption 1 says of ΔW holds here by construction, so that the difference
   to the first experiment is how rounding errors lie to the Hessian's eigenvectors. Each draw comes with both signs,
   so that the gradient drops out.
3. *Lemma 1 as stated*: the same ‖ΔW‖² at every weight; is the loss then ordered by the mean trace?

Spearman's rank correlations over all pairs, and within one width (where size alone explains nothing); their ratios
measured / predicted as quantiles; the gradient term g·ΔW, which the assumption sets to zero.
Results: benchmarks/results/prediction.{json,md,png}.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import nn
from torch.nn import functional as F

from hawq_lightning import Candidate, PlanSite, Site, SiteTable, measure, sites
from hawq_lightning.data import ImageFolderDataModule
from hawq_lightning.models import resnet20
from hawq_lightning.quantization import candidates, enable_site, loss_per_site, prepare, unquantize, weight_candidates
from hawq_lightning.report import BLUE, GREEN, ORANGE, SOFT, ReportFigure, canvas, log_scale
from hawq_lightning.sensitivity import Sensitivity, top_eigenvalues

RESULTS = Path(__file__).resolve().parent / "results"
WEIGHT_BITS, ACTIVATION_BITS = (2, 3, 4, 5, 6, 8), (2, 3, 4, 6, 8)
PREDICTORS = {"trace": "½Ω, mean trace · ‖ΔW‖²", "l2": "‖ΔW‖²", "eigenvalue": "λ₁ ‖ΔW‖²"}
Batches = Sequence[tuple[torch.Tensor, torch.Tensor]]
Row = dict[str, Any]


def loss_fn(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Mean cross-entropy."""
    return F.cross_entropy(model(batch[0]), batch[1])


@torch.no_grad()
def mean_loss(model: nn.Module, batches: Batches) -> float:
    """Over all images."""
    total = sum(float(loss_fn(model, b)) * len(b[1]) for b in batches)
    return total / sum(len(b[1]) for b in batches)


def gradients(model: nn.Module, batches: Batches, names: Iterable[str]) -> dict[str, torch.Tensor]:
    """Of the mean loss, by weight."""
    parameters = dict(model.named_parameters())
    chosen = [parameters[n] for n in names]
    total = [torch.zeros_like(p) for p in chosen]
    count = sum(len(b[1]) for b in batches)
    for b in batches:
        found = torch.autograd.grad(loss_fn(model, b), chosen)
        for t, g in zip(total, found):
            t += g * len(b[1]) / count
    return dict(zip(names, total))


@torch.no_grad()
def noise_change(
    weight: torch.Tensor, norm: float, change: Callable[[], float], draws: int, generator: torch.Generator
) -> tuple[float, float | None]:
    """Mean over draws of the loss change under isotropic noise of a given norm, both signs, and its standard error."""
    kept, found = weight.detach().clone(), []
    for _ in range(draws):
        noise = torch.randn(weight.shape, generator=generator)
        noise *= norm / noise.norm()
        both = []
        for sign in (1, -1):
            weight.copy_(kept + sign * noise)
            both.append(change())
        found.append(sum(both) / 2)
    weight.copy_(kept)
    return float(np.mean(found)), float(np.std(found, ddof=1) / math.sqrt(draws)) if draws > 1 else None


def by_quantization(
    model: nn.Module, batches: Batches, table: SiteTable, traces: Sensitivity, eigenvalues: Mapping[str, float]
) -> list[Row]:
    """Experiment 1, with what the rivals predict and the gradient term."""
    choices = candidates(
        model, batches, traces, table, loss_fn,
        weight_bits=WEIGHT_BITS, activation_bits=ACTIVATION_BITS, input_bits=None,
    )  # fmt: skip
    rows = loss_per_site(model, batches, loss_fn, table, choices)
    slopes = gradients(model, batches, [s.name for s in table if s.kind == "weight"])
    by_name = {s.name: s for s in table}
    for row in rows:
        name, bits = row["site"], row["bits"]
        option = next(o for o in choices[name] if o.bits == bits)
        row["l2"], row["code"] = option.perturbation, option.code
        if row["kind"] == "weight":
            row["eigenvalue"] = eigenvalues[name] * option.perturbation / 2
            row["gradient_term"] = _gradient_term(model, by_name[name], option, slopes[name])
    return rows


def _gradient_term(model: nn.Module, site: Site, option: Candidate, slope: torch.Tensor) -> float:
    chosen = PlanSite(site.name, site.kind, site.layers, site.shape, site.numel, option.bits, option.code)
    layer = prepare(model)[site.layers[0]]
    enable_site(layer, chosen)
    with torch.no_grad():
        term = float((slope * (layer.quantized_weight - layer.weight)).sum())
    unquantize(model)
    return term


def by_noise(model: nn.Module, batches: Batches, rows: Iterable[Row], base: float, draws: int) -> None:
    """Experiment 2, into the rows of the weights."""
    parameters, generator = dict(model.named_parameters()), torch.Generator().manual_seed(0)
    for row in rows:
        if row["kind"] == "weight":
            weight, norm = parameters[row["site"]], math.sqrt(row["l2"])
            found = noise_change(weight, norm, lambda: mean_loss(model, batches) - base, draws, generator)
            row["noise"], row["noise_stderr"] = found


def at_one_norm(
    model: nn.Module, batches: Batches, traces: Sensitivity, eigenvalues: Mapping[str, float], base: float, draws: int
) -> list[Row]:
    """Experiment 3: noise of one norm, that of the median weight at 4 bits, at every weight."""
    parameters, generator = dict(model.named_parameters()), torch.Generator().manual_seed(1)
    weights = [r for r in traces if r.kind == "weight"]
    at_4 = [min(o.perturbation for o in weight_candidates(parameters[r.name], 0, (4,), r.mean_trace)) for r in weights]
    norm = math.sqrt(float(np.median(at_4)))
    rows = []
    for r in weights:
        change, stderr = noise_change(
            parameters[r.name], norm, lambda: mean_loss(model, batches) - base, 2 * draws, generator
        )
        predicted = r.mean_trace * norm**2 / 2
        rows.append({"site": r.name, "norm": norm, "predicted": predicted, "mean_trace": r.mean_trace, "numel": r.numel,
                     "eigenvalue": eigenvalues[r.name], "measured": change, "stderr": stderr})  # fmt: skip
    return rows


def rank(rows: Sequence[Row], predictor: str, measured: str) -> float:
    """Spearman's rank correlation."""
    return float(spearmanr([r[predictor] for r in rows], [r[measured] for r in rows]).statistic)


def ratios(rows: Sequence[Row], measured: str) -> list[float]:
    """10th, 50th and 90th percentile of measured / predicted."""
    found = [r[measured] / r["predicted"] for r in rows if r["predicted"] > 0]
    return [float(v) for v in np.percentile(found, [10, 50, 90])]


def summary(rows: Sequence[Row], equal: Sequence[Row]) -> dict[str, Any]:
    """All correlations and ratios."""
    weights, acts = ([r for r in rows if r["kind"] == k] for k in ("weight", "activation"))
    names = {"trace": "predicted", "l2": "l2", "eigenvalue": "eigenvalue"}
    out: dict[str, Any] = {"quantization": {}, "noise": {}, "activations": {}, "one_norm": {}}
    for what, measured in (("quantization", "measured"), ("noise", "noise")):
        for label, key in names.items():
            within = {b: rank([r for r in weights if r["bits"] == b], key, measured) for b in WEIGHT_BITS}
            out[what][label] = {"all": rank(weights, key, measured), "within": within}
        out[what]["ratio"] = {b: ratios([r for r in weights if r["bits"] == b], measured) for b in WEIGHT_BITS}
    for label in ("trace", "l2"):
        within = {b: rank([r for r in acts if r["bits"] == b], names[label], "measured") for b in ACTIVATION_BITS}
        out["activations"][label] = {"all": rank(acts, names[label], "measured"), "within": within}
    out["activations"]["ratio"] = {b: ratios([r for r in acts if r["bits"] == b], "measured") for b in ACTIVATION_BITS}
    out["one_norm"] = {"trace": rank(equal, "mean_trace", "measured"),
                       "eigenvalue": rank(equal, "eigenvalue", "measured"),
                       "ratio": ratios(equal, "measured")}  # fmt: skip
    share = [abs(r["gradient_term"]) / r["predicted"] for r in weights if r["predicted"] > 0]
    out["gradient_over_prediction"] = [float(v) for v in np.percentile(share, [10, 50, 90])]
    return out


def page(found: Mapping[str, Any], facts: Mapping[str, Any]) -> str:
    """The tables."""

    def cells(part: Mapping[str, Any], widths: Sequence[int]) -> str:
        return " | ".join([f"{part['all']:.2f}", *(f"{part['within'][b]:.2f}" for b in widths)])

    def spread(values: Sequence[float]) -> str:
        return f"{values[1]:.2f} ({values[0]:.2f} to {values[2]:.2f})"

    lines = ["# Predicted against measured change of the loss", "",
             f"{facts['date']}, ResNet20 on CIFAR-10, {facts['images']} training images, loss {facts['loss']:.4f}. "
             "Made by `benchmarks/prediction.py`, whose head says how.", ""]  # fmt: skip
    for what, title in (("quantization", "Weights, quantized one site at a time"),
                        ("noise", "Weights, isotropic noise of the same norms")):  # fmt: skip
        part = found[what]
        lines += [f"## {title}", "", "Spearman's rank correlation with the measured change:", "",
                  f"| predictor | all | {' | '.join(f'{b} bits' for b in WEIGHT_BITS)} |",
                  "|---|" + "---:|" * (1 + len(WEIGHT_BITS))]  # fmt: skip
        lines += [f"| {label} | {cells(part[key], WEIGHT_BITS)} |" for key, label in PREDICTORS.items()]
        found_ratios = " | ".join(spread(part["ratio"][b]) for b in WEIGHT_BITS)
        lines += [f"| measured / ½Ω, median (10% to 90%) | | {found_ratios} |", ""]
    part = found["activations"]
    lines += ["## Activations, quantized one site at a time", "",
              f"| predictor | all | {' | '.join(f'{b} bits' for b in ACTIVATION_BITS)} |",
              "|---|" + "---:|" * (1 + len(ACTIVATION_BITS)),
              f"| ½Ω | {cells(part['trace'], ACTIVATION_BITS)} |", f"| ‖Δa‖² | {cells(part['l2'], ACTIVATION_BITS)} |",
              f"| measured / ½Ω | | {' | '.join(spread(part['ratio'][b]) for b in ACTIVATION_BITS)} |", ""]  # fmt: skip
    part = found["one_norm"]
    lines += ["## Lemma 1: the same ‖ΔW‖² at every weight", "",
              f"Spearman with the measured change: mean trace {part['trace']:.2f}, top eigenvalue "
              f"{part['eigenvalue']:.2f}; measured / predicted {spread(part['ratio'])}.", "",
              f"|g·ΔW| over ½Ω, median (10% to 90%): {spread(found['gradient_over_prediction'])}.", ""]  # fmt: skip
    return "\n".join(lines)


def draw(rows: Sequence[Row], equal: Sequence[Row]) -> ReportFigure:
    """Predicted against measured, log-log: quantization and noise of the weights, activations, Lemma 1."""
    weights, acts = ([r for r in rows if r["kind"] == k] for k in ("weight", "activation"))
    panels = [
        (
            "Weights",
            [(weights, "measured", BLUE, "quantized"), (weights, "noise", ORANGE, "isotropic noise, same norm")],
        ),
        ("Activations", [(acts, "measured", GREEN, "quantized")]),
        ("One norm at every weight (Lemma 1)", [(equal, "measured", ORANGE, "isotropic noise")]),
    ]
    with canvas(3, 12) as (figure, axes):
        for ax, (title, series) in zip(axes, panels):
            ends = []
            for part, key, colour, label in series:
                shown = [(r["predicted"], r[key]) for r in part if r["predicted"] > 0 and r[key] > 0]
                hidden = len(part) - len(shown)
                said = f"{label}, Spearman {rank(part, 'predicted', key):.2f}" + (
                    f", {hidden} not above 0" if hidden else ""
                )
                ax.plot(*zip(*shown), "o", color=colour, markersize=5, alpha=0.7, label=said)
                ends += [v for pair in shown for v in pair]
            ax.plot([min(ends), max(ends)], [min(ends), max(ends)], "--", color=SOFT, linewidth=1)
            log_scale(ax, "x", "y")
            ax.set_title(title)
            ax.set_ylabel("measured")
            ax.legend(loc="upper left")
        axes[-1].set_xlabel("predicted change of the loss, ½Ω")
    columns = ["site", "kind", "bits", "predicted", "measured", "noise"]
    cells = [[r["site"], r["kind"], r["bits"], r["predicted"], r["measured"], r.get("noise", "")] for r in rows]
    return ReportFigure("prediction", "Predicted against measured", "", "", figure, columns, cells)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder with train/ and val/")
    parser.add_argument("--weights", required=True, help="state dict of ResNet20")
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--draws", type=int, default=1, help="noise draws a site and width, each with both signs")
    parser.add_argument("--out", type=Path, default=RESULTS)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    data = ImageFolderDataModule(asked.data, augment="none", memory=True, subset=asked.images, num_classes=10)
    data.setup()
    images = data._sets["train"]
    whole = [torch.stack([images[i][0] for i in range(asked.images)]), images.labels[: asked.images]]  # type: ignore[attr-defined]
    batches = list(zip(whole[0].split(128), whole[1].split(128)))
    model = resnet20(weights=asked.weights).eval()
    seconds: dict[str, float] = {}

    def timed(name: str, run: Callable[[], Any]) -> Any:
        start = time.process_time()
        out = run()
        seconds[name] = time.process_time() - start
        print(f"{name}: {seconds[name]:.0f} s of CPU time", flush=True)
        return out

    base = mean_loss(model, batches)
    table = sites(model, batches[0][0])
    traces = timed(
        "traces", lambda: measure(model, batches, loss_fn, sites=table, rtol=0.05, max_probes=200, progress=False)
    )
    weights = [s.name for s in table if s.kind == "weight"]
    eigenvalues = timed(
        "eigenvalues",
        lambda: top_eigenvalues(model, batches, loss_fn, sites=table, only=weights, rtol=0.1, max_steps=30),
    )
    rows = timed("quantization", lambda: by_quantization(model, batches, table, traces, eigenvalues))
    timed("noise", lambda: by_noise(model, batches, rows, base, asked.draws))
    equal = timed("one norm", lambda: at_one_norm(model, batches, traces, eigenvalues, base, asked.draws))
    found = summary(rows, equal)
    facts = {"date": time.strftime("%Y-%m-%d"), "images": asked.images, "loss": base, "draws": asked.draws,
             "torch": torch.__version__, "seconds": seconds}  # fmt: skip
    asked.out.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"facts": facts, "summary": found, "rows": rows, "one_norm": equal}, indent=1)
    (asked.out / "prediction.json").write_text(text + "\n", encoding="utf-8")
    (asked.out / "prediction.md").write_text(page(found, facts), encoding="utf-8")
    (asked.out / "prediction.png").write_bytes(draw(rows, equal).png())
    print(page(found, facts))


if __name__ == "__main__":
    main()
