"""HAQ's agent, Optuna and chance at equal trials, beside greedy search and traces: loss of their plans, and time.

    pip install 'hawq-lightning[search]'
    python benchmarks/search.py [--trials 64] [--seeds 5]

A convolutional network of six weights is trained on scikit-learn's digits; every weight may have 2 to 8 bits,
activations stay float, and the plan must be 9 times smaller than float32. The searches measure the loss on 400 training
images; the table has the loss on these images, on 450 held-out ones, and the time of search or traces. Nothing is
fine-tuned. The seed is that of the search; the network is the same. Greedy search and traces do not depend on it.

Results: benchmarks/results/search.{json,md}.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

import hawq_lightning as hl
from hawq_lightning.quantization import loss_of_plan

RESULTS = Path(__file__).resolve().parent / "results"
BUDGET, WIDTHS = "9x", (2, 3, 4, 5, 6, 8)
SEARCHES = {"haq": "HAQ", "optuna": "Optuna, TPE", "random_search": "random search"}


def loss_fn(model: nn.Module, batch: Any) -> torch.Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def trained() -> tuple[nn.Module, Any, Any]:
    torch.manual_seed(0)
    digits = load_digits()
    x, y = torch.tensor(digits.images[:, None] / 16, dtype=torch.float32), torch.tensor(digits.target)
    held = torch.arange(len(y)) % 4 == 0
    net = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(128, 32), nn.ReLU(), nn.Linear(32, 10),
    )  # fmt: skip
    optimizer = torch.optim.Adam(net.parameters(), 2e-3)
    for _ in range(600):
        some = torch.randint(int((~held).sum()), (64,))
        optimizer.zero_grad()
        loss_fn(net, (x[~held][some], y[~held][some])).backward()
        optimizer.step()
    return net.eval(), (x[~held][:400], y[~held][:400]), (x[held], y[held])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=64)
    parser.add_argument("--seeds", type=int, default=5)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    net, seen, held = trained()
    table = hl.sites(net, seen)
    rows: list[dict[str, Any]] = []
    began = time.perf_counter()
    traces = hl.measure(net, [seen], loss_fn, sites=table, progress=False)
    choices = hl.candidates(net, [seen], traces, table, loss_fn, weight_bits=WIDTHS, activation_bits=None)
    seconds = time.perf_counter() - began
    problem = hl.Problem(table, choices, traces)

    def note(method: str, seed: int | None, plan: hl.Plan, spent: float) -> None:
        with loss_of_plan(net, [seen], loss_fn) as on_seen, loss_of_plan(net, [held], loss_fn) as on_held:
            rows.append({
                "method": method, "seed": seed, "seconds": spent, "loss": on_seen(plan), "held_out": on_held(plan),
                "w_comp": plan.costs["w_comp"], "bits": dict(plan.bits),
            })  # fmt: skip
        print(rows[-1], flush=True)

    began = time.perf_counter()
    note("HAWQ-V2", None, hl.select(problem, BUDGET), seconds + time.perf_counter() - began)
    for name, title in {"accuracy": "greedy by measured loss", **SEARCHES}.items():
        for seed in range(asked.seeds) if name in SEARCHES else (None,):
            with loss_of_plan(net, [seen], loss_fn) as measured:
                began = time.perf_counter()
                plan = hl.select(problem, BUDGET, name, measure_loss=measured, seed=seed or 0, trials=asked.trials)
                spent = time.perf_counter() - began
            note(title, seed, plan, spent)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "search.json").write_text(json.dumps(rows, indent=1) + "\n")
    (RESULTS / "search.md").write_text(text(rows, asked.trials, asked.seeds))
    print(text(rows, asked.trials, asked.seeds))


def text(rows: list[dict[str, Any]], trials: int, seeds: int) -> str:
    lines = [
        "# Searches at equal trials", "",
        f"Digits, six weights of 2 to 8 bits, {BUDGET} smaller, {trials} trials a search, {seeds} seeds (mean and "
        "range), nothing fine-tuned; `python benchmarks/search.py`.", "",
        "| method | loss, images of the search | loss, held out | seconds | W-Comp |", "|---|---:|---:|---:|---:|",
    ]  # fmt: skip
    for method in dict.fromkeys(r["method"] for r in rows):
        mine = [r for r in rows if r["method"] == method]
        loss, held = ([r[k] for r in mine] for k in ("loss", "held_out"))
        lines.append(
            f"| {method} | {_spread(loss)} | {_spread(held)} | {statistics.mean(r['seconds'] for r in mine):.1f} | "
            f"{statistics.mean(r['w_comp'] for r in mine):.2f} |"
        )
    of = {m: {r["seed"]: r["loss"] for r in rows if r["method"] == m} for m in SEARCHES.values()}
    for method in ("HAQ", "Optuna, TPE"):
        better = sum(of[method][s] < of["random search"][s] for s in of[method])
        worse = sum(of[method][s] > of["random search"][s] for s in of[method])
        lines += [
            "",
            f"Against random search {method} has a lower loss at {better} of {seeds} seeds, a higher at {worse}.",
        ]
    return "\n".join(lines) + "\n"


def _spread(values: list[float]) -> str:
    if len(values) == 1:
        return f"{values[0]:.4f}"
    return f"{statistics.mean(values):.4f} ({min(values):.4f} to {max(values):.4f})"


if __name__ == "__main__":
    main()
