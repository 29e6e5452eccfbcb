"""How well could a sum over sites rank plans? What numbers reach that hundreds of measured plans have taught.

    python benchmarks/forecast_ceiling.py --network resnet20 --weights resnet20_cifar10.pt [--plans 300] [--means 2.5]
    python benchmarks/forecast_ceiling.py --network mobilenet_cifar --weights mobilenet_cifar.pt --plans 400

A forecast like P or Omega is a sum over sites of a number a site and width. The best such numbers are looked for here:
random plans of the weights are drawn as in forecast.py and their KL divergence from the float network measured on 256
held-out images, right after quantizing; ridge regression on the sites' widths learns from nine tenths of them what
every site's width adds (to the KL, to its logarithm, to its rank), and is judged on the last tenth, ten times. Its
Spearman rank correlation is what numbers that were taught by hundreds of measurements reach; a forecast has none. How
much of the rest is chance of the images is told by a second set of 256 images.

Between the two: P's shares (three points, without a tangent, 256 held-out images of neither set; rows of 2026-11-26: of
training images) with what 16, 48 or 96 measured plans say beside them, by ridge regression of the logarithm of KL / P
on the widths, each reaching the square root of its share; judged on the other plans, mean over 20 draws of the measured
ones. Stopped, the same command goes on.

Results: benchmarks/results/forecast_ceiling.{json,md}.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from forecast import MEANS, RESULTS, WIDTHS, random_bits
from forecast_subjects import BATCH, NETWORKS, images_of, kl, loss_fn
from scipy.stats import rankdata, spearmanr

from hawq_lightning import Problem, SiteTable, candidates, measure, sites
from hawq_lightning.quantization import FloatDistance, forecast, plans_in_place
from hawq_lightning.selection import select

SET = 256 // BATCH  # batches of one set of images
FOLDS, RIDGES = 10, (1.0, 3.0, 10.0, 30.0)
TAUGHT, DRAWS, RIDGE = (16, 48, 96), 20, 0.3  # measured plans beside P; the ridge in mean squared lengths of a row
TARGETS = {"KL": np.asarray, "its logarithm": np.log, "its rank": rankdata}


def measured(args: argparse.Namespace, known: dict[str, Any], keep: Any) -> None:
    """Plans that are missing: bits by site, Omega, KL on the first and on the second set of images."""
    net, batches, held_out = images_of(args)
    table = sites(net, batches[0][0])
    widths = {"weight_bits": WIDTHS, "activation_bits": None, "input_bits": None}
    traces = measure(net, batches[:1], loss_fn, sites=table, progress=False)
    weighed = candidates(net, batches[:1], traces, table, loss_fn, **widths)
    chosen = SiteTable(tuple(s for s in table if s.name in weighed), table.layers)
    problem = Problem(chosen, weighed, traces)
    if "shares" not in known:
        made = forecast(net, held_out[2 * SET : 3 * SET], loss_fn, table, weighed, mode="accurate")
        known["shares"] = [[made.shares[s.name][w] for w in WIDTHS] for s in chosen.weights]
    sets = [held_out[:SET], held_out[SET : 2 * SET]]
    targets = [FloatDistance(net, images, loss_fn) for images in sets]
    for mean in args.means:
        rows = known.setdefault("plans", {}).setdefault(str(mean), [])
        generator = torch.Generator().manual_seed(11)
        for bits in [random_bits(chosen.weights, mean, generator) for _ in range(args.plans)][len(rows) :]:
            plan = select(problem, None, "manual", bits=bits)
            with plans_in_place(net) as put:
                put(plan)
                first, second = (kl(net, images, target) for images, target in zip(sets, targets))
            rows.append({"bits": [bits[s.name] for s in chosen.weights], "omega": plan.omega, "a": first, "b": second})
            if len(rows) % 20 == 0:
                keep()
    keep()


def taught(rows: list[dict[str, Any]], target: Any) -> float:
    """Spearman of left-out plans under the best of the ridges."""
    bits = np.array([r["bits"] for r in rows])
    x = np.concatenate([(bits == w).astype(float) for w in WIDTHS], 1)
    judged = np.array([r["a"] for r in rows])
    y = target(judged)
    order = np.random.default_rng(0).permutation(len(y))
    best = -1.0
    for ridge in RIDGES:
        guess = np.zeros(len(y))
        for fold in range(FOLDS):
            left_out = order[fold::FOLDS]
            learned = np.setdiff1d(order, left_out)
            centre = x[learned].mean(0)
            a = x[learned] - centre
            slopes = np.linalg.solve(a.T @ a + ridge * np.eye(x.shape[1]), a.T @ (y[learned] - y[learned].mean()))
            guess[left_out] = (x[left_out] - centre) @ slopes
        best = max(best, float(spearmanr(guess, judged)[0]))
    return best


def beside_p(rows: list[dict[str, Any]], shares: list[list[float]]) -> tuple[float, list[float]]:
    """Spearman of P, and of P with what some measured plans say beside it."""
    share = np.array(shares)
    width = np.searchsorted(WIDTHS, np.array([r["bits"] for r in rows]))
    site = np.arange(len(share))
    measured_kl = np.array([r["a"] for r in rows])
    p = share[site[None], width].sum(1)
    reach = np.sqrt(np.maximum(share, share.max() * 1e-3) / p.mean())
    x = np.zeros((len(rows), share.size))
    for i, widths in enumerate(width):
        x[i, site * share.shape[1] + widths] = reach[site, widths]
    off = np.log(measured_kl / p)
    found = []
    for count in TAUGHT:
        ranks = []
        for draw in range(DRAWS):
            order = np.random.default_rng(draw).permutation(len(rows))
            seen, others = order[:count], order[count:]
            a = x[seen] - x[seen].mean(0)
            ridge = RIDGE * (a**2).sum(1).mean()
            slopes = np.linalg.solve(a.T @ a + ridge * np.eye(a.shape[1]), a.T @ (off[seen] - off[seen].mean()))
            ranks.append(spearmanr(np.log(p[others]) + x[others] @ slopes, measured_kl[others])[0])
        found.append(float(np.mean(ranks)))
    return float(spearmanr(p, measured_kl)[0]), found


def table_of(report: dict[str, Any]) -> str:
    """A row a network and mean."""
    lines = [
        "# Sums over sites, taught by measured plans", "",
        f"{report['date']}, torch {report['torch']}, one thread. Made by `benchmarks/forecast_ceiling.py`, whose head "
        "says how. Spearman with the measured KL right after quantizing.", "",
        "| network | mean bits | plans | KL, median and 90% | Ω | P | " + " | ".join(f"P and {n} plans" for n in TAUGHT)
        + " | " + " | ".join(f"taught on {n}" for n in TARGETS) + " | other images |",
        "|---|---:|---:|---:|---:|" + "---:|" * (len(TAUGHT) + len(TARGETS) + 2),
    ]  # fmt: skip
    for network, known in report["networks"].items():
        for mean, rows in known["plans"].items():
            a, b = (np.array([r[k] for r in rows]) for k in "ab")
            low, middle, high = np.quantile(a, [0.05, 0.5, 0.95])
            omega = spearmanr([r["omega"] for r in rows], a)[0]
            p, beside = beside_p(rows, known["shares"])
            found = " | ".join(f"{v:.3f}" for v in (p, *beside, *(taught(rows, t) for t in TARGETS.values())))
            lines.append(
                f"| {network} | {mean} | {len(rows)} | {middle:.2f} ({low:.2f} to {high:.2f}) | {omega:.3f} | "
                f"{found} | {spearmanr(a, b)[0]:.3f} |"
            )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("/tmp/data/cifar10"), help="folder with train/ and val/")
    parser.add_argument("--network", choices=NETWORKS, default="resnet20")
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--plans", type=int, default=400, help="of each mean")
    parser.add_argument("--means", type=float, nargs="+", default=list(MEANS), help="bits of a weight")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    args.images = args.plan_images = 2 * SET * BATCH
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / "forecast_ceiling.json"
    report: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {"networks": {}}
    report |= {"date": time.strftime("%Y-%m-%d"), "torch": torch.__version__}

    def keep() -> None:
        part = file.with_suffix(".part")
        part.write_text(json.dumps(report) + "\n", encoding="utf-8")
        part.replace(file)

    measured(args, report["networks"].setdefault(args.network, {}), keep)
    text = table_of(report)
    file.with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
