"""What selection minimises: Omega, Q, or the geometric mean of both, on trained networks and equal budgets.

    python benchmarks/scores.py --data cifar10 --weights resnet20=resnet20_cifar10.pt mobilenet_cifar=mobilenet_cifar.pt

Of each network and budget (2.5, 3 and 4 bits a weight on average; activations of 8 or of 4 bits, or chosen one by one
with 4 bits on average) the plan of each score is quantized, and judged by the KL divergence from the float network on
held-out images: right after quantizing, and with BatchNorm measured again on the images of the traces. The line that a
default other than Omega has to keep: geometric mean of KL over Omega's <= 0.95 at both stages, none above 1.10, and
<= 1.00 after fine-tuning (not done here: a score that fails before is not fine-tuned).

Resumable: what is in the results file is not made again. Results: benchmarks/results/scores.{json,md}.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from pathlib import Path
from typing import Any

import torch
from forecast_subjects import BATCH, images_of, kl, loss_fn
from torch import nn

from hawq_lightning import Problem, SiteTable, candidates, measure, quantize, sites
from hawq_lightning.quantization import FloatDistance, rounding_errors, unquantize
from hawq_lightning.quantization.post_training import reestimate_batchnorm
from hawq_lightning.selection import select

RESULTS = Path(__file__).resolve().parent / "results"
SCORES, BITS = ("omega", "rounding", "both"), (2, 3, 4, 5, 6, 8)
WEIGHTS = ("2.5bit", "3bit", "4bit")
ACTIVATIONS: dict[str, tuple[tuple[int, ...], str | None]] = {
    "8 bits": ((8,), None), "4 bits": ((4,), None), "4 bits on average": (BITS, "8x"),
}  # fmt: skip
STAGES, AIM, WORST = ("after quantizing", "after batchnorm"), 0.95, 1.10


def of_network(name: str, args: argparse.Namespace, found: dict[str, Any]) -> dict[str, Any]:
    """A row a setting and score."""
    net, batches, held_out = images_of(args)
    few = slice(-(-args.images // BATCH))
    batches, held_out = batches[few], held_out[few]
    table = sites(net, batches[0][0])
    target = FloatDistance(net, held_out, loss_fn)
    float_state = {k: v.clone() for k, v in net.state_dict().items()}
    for activations, (widths, act_budget) in ACTIVATIONS.items():
        settings = [f"{name}, {w}, activations {activations}" for w in WEIGHTS]
        if all(s in found for s in settings):
            continue
        bits: dict[str, Any] = {"weight_bits": BITS, "activation_bits": widths, "input_bits": 8}
        rounding = rounding_errors(net, candidates(net, batches, None, table, loss_fn, **bits), table)
        traces = measure(net, batches, loss_fn, sites=table, rounding=rounding, progress=False)
        weighed = candidates(net, batches, traces, table, loss_fn, **bits)
        chosen = SiteTable([s for s in table if s.name in weighed], table.layers)
        for setting, budget in zip(settings, WEIGHTS):
            row: dict[str, Any] = {}
            for score in SCORES:
                problem = Problem(chosen, weighed, traces, score=score)
                plan = select(problem, budget if act_budget is None else {"weights": budget, "act": act_budget})
                quantize(net, plan)
                after = [kl(net, held_out, target)]
                if any(isinstance(m, nn.BatchNorm2d) for m in net.modules()):
                    reestimate_batchnorm(net, batches)
                    net.eval()
                    after.append(kl(net, held_out, target))
                unquantize(net)
                net.load_state_dict(float_state)
                row[score] = dict(zip(STAGES, after))
            found[setting] = row
            print(setting, row, flush=True)
    return found


def table_of(report: dict[str, Any]) -> str:
    """As Markdown."""
    rows = report["settings"]
    lines = [
        "# Scores: what selection minimises", "",
        f"{report['date']}, {report['images']} images for the traces and as many held-out ones for the KL, torch "
        f"{report['torch']}. Made by `benchmarks/scores.py`, whose head says how.", "",
        "KL of Ω's plan, and that of the others' plans over it: right after quantizing; with BatchNorm measured again.",
        "", "| setting | Ω | Q | √(ΩQ) |", "|---|---|---|---|",
    ]  # fmt: skip
    ratios: dict[str, dict[str, list[float]]] = {s: {stage: [] for stage in STAGES} for s in SCORES[1:]}
    for setting, row in rows.items():
        stages = list(row["omega"])
        cells = ["; ".join(f"{row['omega'][s]:.4g}" for s in stages)]
        for score in SCORES[1:]:
            values = [row[score][s] / row["omega"][s] for s in stages]
            for stage, value in zip(stages, values):
                ratios[score][stage].append(value)
            cells.append("; ".join(f"{v:.3f}" for v in values))
        lines.append(f"| {setting} | " + " | ".join(cells) + " |")
    lines += [
        "", f"Geometric means over {len(rows)} settings (aim: at most {AIM}), and the worst (at most {WORST}):", "",
        "| score | stage | geometric mean | worst | settings above 1 |", "|---|---|---|---|---|",
    ]  # fmt: skip
    for score, by_stage in ratios.items():
        for stage, values in by_stage.items():
            if values:
                mean = math.exp(math.fsum(map(math.log, values)) / len(values))
                over = sum(v > 1 for v in values)
                lines.append(f"| {score} | {stage} | {mean:.3f} | {max(values):.3f} | {over} of {len(values)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Make what is missing of the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("/tmp/data/cifar10"), help="folder with train/ and val/")
    parser.add_argument("--weights", nargs="+", required=True, metavar="NETWORK=FILE")
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / "scores.json"
    report: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {"settings": {}}
    report |= {"date": time.strftime("%Y-%m-%d"), "images": args.images, "torch": torch.__version__}
    for given in args.weights:
        network, weights = given.split("=", 1)
        asked = argparse.Namespace(**vars(args) | {"network": network, "weights": weights, "plan_images": args.images})
        of_network(network, asked, report["settings"])
        file.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        file.with_suffix(".md").write_text(table_of(report), encoding="utf-8")
    print(table_of(report))


if __name__ == "__main__":
    main()
