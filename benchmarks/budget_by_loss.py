"""Budgets by loss on three networks: is the measured loss within, and how much smaller could the plan be?

    python benchmarks/budget_by_loss.py --data cifar10 --weights resnet20_cifar10.pt [--threads 1]

ResNet20 on CIFAR-10 as trained, ResNet20 on digits and a depthwise-separable network on digits, both trained here
(seconds to minutes; kept in --nets). Weights at 2, 3, 4, 6 or 8 bits, activations at 8. Traces are of 512 train
images, forecasts and judgements of 512 held-out ones each (digits have 540 in all: 135 and 405), as the callback HAWQ
has it.

What is asked of each budget: the measured value of the plan keeps it; and the plan is hardly larger than the smallest
one that does. For the latter the plans of the frontier are measured one by one, 2% of size apart, from the plan's own
size down to 60% of it.

Every part is kept in the results file as soon as it is there, and not made again: delete the file to begin anew.

Results: benchmarks/results/budget_by_loss.{json,md}.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Subset

from hawq_lightning import Problem, candidates, forecast, measure, sites
from hawq_lightning.data import DigitsDataModule, ImageFolderDataModule
from hawq_lightning.models import resnet20
from hawq_lightning.quantization import After, FloatDistance, distance_of_plan
from hawq_lightning.quantization.post_training import reestimate_batchnorm
from hawq_lightning.selection import (
    PASSES,
    Outlook,
    hold_against,
    look_ahead,
    omega_table,
    plan_frontier,
    select_by_loss,
)
from hawq_lightning.tasks import ClassificationTask

RESULTS = Path(__file__).resolve().parent / "results"
WIDTHS = (2, 3, 4, 6, 8)
IMAGES, STEP, DOWN = 512, 1.02, 0.6
AFTER: tuple[After, ...] = ("quantizing", "batchnorm")
BUDGETS: dict[str, list[dict[str, Any]]] = {
    "ResNet20, CIFAR-10": [
        {"kl": 0.3}, {"kl": 0.1}, {"kl": 0.03}, {"kl": 0.01}, {"agreement": "95%"}, {"agreement": "98%"},
        {"kl": 0.06, "after": "batchnorm"}, {"agreement": "95%", "after": "batchnorm"},
    ],
    "ResNet20, digits": [
        {"kl": 0.1}, {"kl": 0.02}, {"kl": 0.005}, {"agreement": "97%"}, {"agreement": "99%"},
        {"kl": 0.01, "after": "batchnorm"}, {"agreement": "99%", "after": "batchnorm"},
    ],
    "depthwise, digits": [
        {"kl": 0.1}, {"kl": 0.03}, {"kl": 0.01}, {"agreement": "97%"}, {"agreement": "99%"},
        {"kl": 0.02, "after": "batchnorm"}, {"agreement": "98%", "after": "batchnorm"},
    ],
}  # fmt: skip
Batches = list[Any]


def loss_fn(model: nn.Module, batch: Any) -> torch.Tensor:
    """The labelled loss."""
    return F.cross_entropy(model(batch[0]), batch[1])


def depthwise() -> nn.Module:
    """Two depthwise-separable blocks behind a convolution, for 8x8 grey images."""

    def conv(before: int, after: int, kernel: int, **more: int) -> list[nn.Module]:
        layer = nn.Conv2d(before, after, kernel, padding=kernel // 2, bias=False, **more)
        return [layer, nn.BatchNorm2d(after), nn.ReLU()]

    layers = conv(1, 24, 3)
    for before, after, stride in ((24, 48, 2), (48, 96, 2), (96, 96, 1)):
        layers += conv(before, before, 3, groups=before, stride=stride) + conv(before, after, 1)
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(96, 10))


def drawn(dataset: Any, images: int) -> tuple[Batches, Batches]:
    """The same images every time, in batches, and as many others or a quarter of all."""
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0)).tolist()
    first = min(images, len(order) * 3 // 4)
    parts = order[:first], order[first : first + images]
    return list(DataLoader(Subset(dataset, parts[0]), 128)), list(DataLoader(Subset(dataset, parts[1]), 128))


def network(name: str, args: argparse.Namespace) -> tuple[nn.Module, Batches, Batches, Batches]:
    """A trained network, train images, held-out images to judge on and others to forecast on."""
    if "CIFAR" in name:
        data: Any = ImageFolderDataModule(args.data, num_classes=10, augment="none", memory=False)
        net = resnet20(weights=args.weights)
    else:
        data = DigitsDataModule(shift=0)
        net = depthwise() if "depthwise" in name else resnet20(num_classes=10, in_channels=1)
        file = args.nets / f"{name.split(',')[0]}.pt"
        if not file.is_file():
            pl.seed_everything(0, verbose=False)
            args.nets.mkdir(parents=True, exist_ok=True)
            trained = resnet20(num_classes=10, in_channels=1) if "ResNet" in name else depthwise()
            silent = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
            trainer = pl.Trainer(max_epochs=args.epochs, accelerator="cpu", enable_model_summary=False, **silent)
            trainer.fit(ClassificationTask(trained, 10, lr=0.05), datamodule=DigitsDataModule())
            torch.save(trained.state_dict(), file)
        net.load_state_dict(torch.load(file, weights_only=True))
    data.setup("fit")
    return net.eval(), drawn(data.train_dataloader().dataset, IMAGES)[0], *drawn(data.val_dataloader().dataset, IMAGES)


def work(name: str, args: argparse.Namespace, part: dict[str, Any], keep: Callable[[], None]) -> None:
    """Everything of one network into ``part``."""
    net, batches, held_out, others = network(name, args)
    table = sites(net, batches[0][0])
    began = time.perf_counter()
    traces = measure(net, batches, loss_fn, sites=table, progress=False)
    weighed = candidates(net, batches, traces, table, loss_fn, weight_bits=WIDTHS)
    part.setdefault("seconds", {})["traces"] = time.perf_counter() - began
    problem = Problem(table, weighed, traces)
    target = FloatDistance(net, held_out, loss_fn)
    for after in AFTER:
        settle = partial(reestimate_batchnorm, batches=batches) if after == "batchnorm" else None
        began = time.perf_counter()
        made = forecast(net, others, loss_fn, table, weighed, mode=args.forecast, after=after)
        part["seconds"][f"forecast, {after}"] = time.perf_counter() - began

        with distance_of_plan(net, held_out, target, settle=settle) as measured:
            front = plan_frontier(problem)
            began = time.perf_counter()
            seen = hold_against(look_ahead(front, problem, made, PASSES // len(AFTER)), made, measured)
            part["seconds"][f"calibration, {after}"] = time.perf_counter() - began
            outlook = Outlook(
                {after: made}, omega_table(problem), seen, sum(len(b[1]) for b in held_out), "held-out images"
            )
            part.setdefault("quality", {})[after] = outlook.quality()
            rows = part.setdefault("rows", {})
            for budget in BUDGETS[name]:
                if budget.get("after", "quantizing") == after and (key := words(budget)) not in rows:
                    began = time.perf_counter()
                    plan = select_by_loss(problem, budget, measured, partial(outlook.of, after=after))
                    rows[key] = {
                        "budget": budget, "size": plan.costs["weight_bytes"], "w_comp": plan.costs["w_comp"],
                        "seconds": time.perf_counter() - began, **plan.settings["by_loss"],
                    }  # fmt: skip
                    keep()
            dense = part.setdefault("frontier", {}).setdefault(after, [])
            costs = np.asarray(front.cost)
            for row in [r for r in rows.values() if r["after"] == after]:
                steps = round(math.log(1 / DOWN) / math.log(STEP))
                for size in np.geomspace(row["size"] * DOWN, row["size"], steps + 1):
                    i = int(np.searchsorted(costs, size * (1 + 1e-9), side="right")) - 1
                    if i < 0 or any(x["size"] == costs[i] for x in dense):
                        continue
                    loss = measured(front.plan(i))
                    dense.append({"size": float(costs[i]), "kl": loss.kl, "changed": loss.changed})
                    keep()


def words(budget: Mapping[str, Any]) -> str:
    """A budget as a key."""
    return ", ".join(f"{k} {v}" for k, v in budget.items())


def smallest(part: Mapping[str, Any], row: Mapping[str, Any]) -> float:
    """The least size among the plans measured one by one that keeps the budget, or that of the plan itself."""
    word = "kl" if "kl" in row["budget"] else "agreement"
    limit = row[word]["limit"]

    def keeps(x: Mapping[str, float]) -> bool:
        return x["kl"] <= limit if word == "kl" else 1 - x["changed"] >= limit - 1e-9

    return min([x["size"] for x in part["frontier"][row["after"]] if keeps(x)] + [row["size"]])


def tables(report: Mapping[str, Any]) -> str:
    """The results as Markdown."""
    lines = [
        "# Budgets by loss", "",
        f"{report['date']}, torch {report['torch']}, {report['threads']} threads, "
        f"forecast={report.get('forecast', 'accurate')!r}. Made by `benchmarks/budget_by_loss.py`, whose head says "
        "how.", "",
        "| network | budget | forecast | measured | kept | smaller | size / smallest that keeps it | plans | s |",
        "|---|---|---:|---:|---|---:|---:|---:|---:|",
    ]  # fmt: skip
    kept, near, count = 0, 0, 0
    for name, part in report["networks"].items():
        for row in part.get("rows", {}).values():
            if row["after"] not in part.get("frontier", {}):
                continue
            word = "kl" if "kl" in row["budget"] else "agreement"
            got = row[word]
            good = got["measured"] <= got["limit"] if word == "kl" else got["measured"] >= got["limit"] - 1e-9
            ratio = row["size"] / smallest(part, row)
            kept, near, count = kept + good, near + (ratio <= 1.05), count + 1
            shown = (lambda x: f"{x:.4f}") if word == "kl" else (lambda x: f"{100 * x:.2f}%")
            lines.append(
                f"| {name} | {words(row['budget'])} | {shown(got['forecast'])} | {shown(got['measured'])} | "
                f"{'yes' if good else 'NO'} | {row['w_comp']:.2f}x | {ratio:.3f} | {row['plans_measured']} | "
                f"{row['seconds']:.0f} |"
            )
    lines += ["", f"Kept: {kept} of {count}. At most 5% larger than the smallest that keeps it: {near} of {count}.", ""]
    for name, part in report["networks"].items():
        seconds = ", ".join(f"{k} {v:.0f} s" for k, v in part.get("seconds", {}).items())
        lines.append(f"* {name}: {seconds}. {' '.join(part.get('quality', {}).values())}")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Make what is missing of the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("/tmp/data/cifar10"), help="folder with train/ and val/")
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument(
        "--nets", type=Path, default=Path("/tmp/budget_by_loss"), help="where trained networks are kept"
    )
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--networks", nargs="+", default=list(BUDGETS), choices=list(BUDGETS))
    parser.add_argument("--forecast", choices=("fast", "accurate"), default="fast", help="points of the path")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / "budget_by_loss.json"
    report: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {"networks": {}}
    report |= {"date": time.strftime("%Y-%m-%d"), "torch": torch.__version__, "threads": args.threads}
    report |= {"forecast": args.forecast}

    def keep() -> None:
        part = file.with_suffix(".part")
        part.write_text(json.dumps(report) + "\n", encoding="utf-8")
        part.replace(file)
        (args.out / "budget_by_loss.md").write_text(tables(report), encoding="utf-8")

    for name in args.networks:
        work(name, args, report["networks"].setdefault(name, {}), keep)
    keep()
    print(tables(report))


if __name__ == "__main__":
    main()
