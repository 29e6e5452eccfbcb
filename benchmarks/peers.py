"""Other tools' choices of bits beside ours at equal size: our quantizers, the same short fine-tuning, accuracy.

    for tool in mct modelopt aimet nncf; do ENVIRONMENT/$tool/bin/python benchmarks/peer_plans.py $tool ...; done
    python benchmarks/peers.py --network resnet20 --weights resnet20_cifar10.pt --data cifar10

The plans of peer_plans.py, and three that are made here at the same size: HAWQ-V2, uniform bits, and CLADO (Deng et al.
2023, arXiv:2307.05657) as its paper has it: the change of the loss by every pair of layers and widths, measured on a
small set, made positive semi-definite, and the quadratic programme over one width a layer. The programme is solved by
descent over single and paired moves from several starts, not by a solver with a proof. Activations have 8 bits
everywhere, calibrated by us; what a tool would do with its own quantizers is not measured. Every plan is fine-tuned
alike, ``--seeds`` times. Done rows are kept in the results and not made again.

Results: benchmarks/results/peers.{json,md}.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Subset

import hawq_lightning as hl
from hawq_lightning import models
from hawq_lightning.data import ImageFolderDataModule
from hawq_lightning.quantization import loss_of_plan, unquantize

RESULTS = Path(__file__).resolve().parent / "results"
WIDTHS, PAIR_WIDTHS = (2, 3, 4, 6, 8), (2, 4, 8)
TITLES = {
    "hawq_v2": "HAWQ-V2", "uniform": "uniform", "clado": "CLADO", "mct": "MCT", "modelopt": "ModelOpt `auto_quantize`",
    "aimet": "AIMET AMP", "nncf": "NNCF `compress_weights`",
}  # fmt: skip
LR, MOMENTUM, BATCH = 0.01, 0.9, 64


def loss_fn(model: nn.Module, batch: Any) -> torch.Tensor:
    """Of labelled images."""
    return F.cross_entropy(model(batch[0]), batch[1])


def draw(dataset: Any, count: int, batch: int, seed: int = 0) -> list[Any]:
    """Images in a fixed random order."""
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed))[:count].tolist()
    return [tuple(b) for b in DataLoader(Subset(dataset, order), batch)]


@torch.no_grad()
def accuracy(net: nn.Module, batches: list[Any]) -> float:
    """Share of right classes."""
    net.eval()
    right = sum(int((net(x).argmax(1) == y).sum()) for x, y in batches)
    return right / sum(len(y) for _, y in batches)


def pair_losses(problem: hl.Problem, loss: Callable[[hl.Plan], float], top: int) -> np.ndarray:
    """CLADO's matrix over (layer, width): what two change the loss by beyond each alone; twice one (diagonal).

    Args:
        problem: whose weights are quantized.
        loss: of a plan.
        top: width that stands for float.
    """
    names = [s.name for s in problem.sites if s.kind == "weight"]
    cells = [(i, b) for i in range(len(names)) for b in PAIR_WIDTHS if b != top]
    base = dict.fromkeys(names, top)

    def at(*chosen: tuple[int, int]) -> float:
        bits = base | {names[i]: b for i, b in chosen}
        return loss(hl.select(problem, None, "manual", bits=bits))

    zero = at()
    alone = [at(c) - zero for c in cells]
    matrix = np.diag(2 * np.array(alone))
    for m, a in enumerate(cells):
        for n in range(m):
            if cells[n][0] != a[0]:
                matrix[m, n] = matrix[n, m] = at(a, cells[n]) - zero - alone[m] - alone[n]
    values, vectors = np.linalg.eigh(matrix)
    semidefinite: np.ndarray = (vectors * np.maximum(values, 0)) @ vectors.T
    return semidefinite


def quadratic_programme(
    matrix: np.ndarray, numel: list[int], size: float, top: int, starts: int = 20
) -> dict[int, int]:
    """Layer -> width of least quadratic form within ``size`` bytes, by moves of one layer and of two.

    Args:
        matrix: of :func:`pair_losses`.
        numel: elements by layer.
        size: bytes.
        top: width that has no cell, and no loss.
        starts: random starts.
    """
    lower = [b for b in PAIR_WIDTHS if b != top]
    index = {(i, b): i * len(lower) + k for i in range(len(numel)) for k, b in enumerate(lower)}

    def value(bits: list[int]) -> float:
        at = [index[i, b] for i, b in enumerate(bits) if b != top]
        return float(matrix[np.ix_(at, at)].sum()) / 2

    def fits(bits: list[int]) -> bool:
        return sum(n * b for n, b in zip(numel, bits)) / 8 <= size

    generator, best = np.random.default_rng(0), (np.inf, [min(PAIR_WIDTHS)] * len(numel))
    for _ in range(starts):
        bits = [min(PAIR_WIDTHS)] * len(numel)
        for i in generator.permutation(len(numel)).tolist():
            raised = [*bits[:i], int(generator.choice(PAIR_WIDTHS)), *bits[i + 1 :]]
            bits = raised if fits(raised) else bits
        score, improved = value(bits), True
        while improved:
            improved = False
            singles = [{i: b} for i in range(len(bits)) for b in PAIR_WIDTHS]
            pairs = [
                {i: b, j: c} for i in range(len(bits)) for j in range(len(bits)) if i != j
                for b in PAIR_WIDTHS if b > bits[i] for c in PAIR_WIDTHS if c < bits[j]
            ]  # fmt: skip
            for move in singles + pairs:
                moved = [move.get(i, b) for i, b in enumerate(bits)]
                if fits(moved) and (now := value(moved)) < score - 1e-12:
                    bits, score, improved = moved, now, True
        if score < best[0]:
            best = (score, bits)
    return dict(enumerate(best[1]))


def plans_here(net: nn.Module, batches: list[Any], mean: float, pairs: int) -> tuple[hl.Problem, dict[str, Any]]:
    """The problem, and the plans made here: tool -> bits, seconds of CPU time, how; CLADO's where ``pairs``."""
    began = time.process_time()
    table = hl.sites(net, batches[0][0])
    traces = hl.measure(net, batches, loss_fn, sites=table, progress=False)
    weighed = hl.candidates(net, batches, traces, table, loss_fn, weight_bits=WIDTHS, activation_bits=8)
    problem = hl.Problem(table, weighed, traces)
    budget = f"{mean:g}bit"
    found: dict[str, Any] = {}
    bits = hl.select(problem, budget).bits
    found["hawq_v2"] = {"bits": bits, "cpu_seconds": time.process_time() - began, "asked": "traces to 5%, least Ω"}
    found["uniform"] = {"bits": hl.select(problem, budget, "uniform").bits, "cpu_seconds": 0.0, "asked": "no search"}
    if not pairs:
        return problem, found
    began = time.process_time()
    weights = [s for s in table if s.kind == "weight"]
    few = [(batches[0][0][:pairs], batches[0][1][:pairs])]
    with loss_of_plan(net, few, loss_fn) as loss:
        matrix = pair_losses(problem, loss, max(WIDTHS))
    numel = [s.numel for s in weights]
    chosen = quadratic_programme(matrix, numel, mean * sum(numel) / 8, max(WIDTHS))
    found["clado"] = {
        "bits": {weights[i].name: b for i, b in chosen.items()}, "cpu_seconds": time.process_time() - began,
        "asked": f"pairs of layers at {PAIR_WIDTHS} bits, {len(few[0][1])} images",
    }  # fmt: skip
    return problem, found


def fine_tuned(net: nn.Module, images: list[Any], seed: int) -> None:
    """One epoch of SGD, mirrored images, rate falling to zero."""
    torch.manual_seed(seed)
    optimizer = torch.optim.SGD(net.parameters(), LR, MOMENTUM, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(images))
    net.train()
    for i in torch.randperm(len(images)).tolist():
        x, y = images[i]
        x = torch.where(torch.rand(len(x), 1, 1, 1) < 0.5, x.flip(3), x)
        optimizer.zero_grad()
        loss_fn(net, (x, y)).backward()
        optimizer.step()
        schedule.step()


def text(report: Mapping[str, Any]) -> str:
    """The tables."""
    lines = ["# Peers' plans at equal size", ""]
    for network, part in report.items():
        lines += [
            f"## {network}", "",
            f"Float {part['float']:.2%}. {part['mean_bits']:g} bits a weight on average, 8-bit activations; fine-tuned "
            f"by one epoch of {part['train_images']:,} images; accuracy on {part['val_images']:,} images of `val`, "
            "mean and standard deviation over seeds. Search: CPU seconds of one thread.", "",
            "| bits chosen by | size, KiB | search, CPU s | before | after fine-tuning | seeds | how |",
            "|---|---:|---:|---:|---:|---:|---|",
        ]  # fmt: skip
        for tool, row in part["rows"].items():
            name = TITLES[tool] + (f" {row['version']}" if "version" in row else "")
            if "error" in row:
                lines.append(f"| {name} | | {row['cpu_seconds']:.0f} | | | | cannot be had: {row['error']} |")
                continue
            after = [100 * v for v in row.get("after", {}).values()]
            spread = f" ± {statistics.stdev(after):.2f}" if len(after) > 1 else ""
            told = f"{statistics.mean(after):.2f}%{spread}" if after else "not measured"
            lines.append(
                f"| {name} | {row.get('bytes', 0) / 1024:.1f} | {row['cpu_seconds']:.0f} | "
                f"{row.get('before', 0):.2%} | "
                f"{told} | {len(after)} | {row['asked']} |"
            )
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    """Make what is missing of the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=("resnet20", "mobilenet_cifar"), default="resnet20")
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True, help="folder with train/ and val/")
    parser.add_argument("--plans", type=Path, default=RESULTS / "peer_plans")
    parser.add_argument("--bits", type=float, default=3.0, help="mean bits of a weight")
    parser.add_argument("--images", type=int, default=64, help="for traces and losses")
    parser.add_argument("--pairs", type=int, default=32, help="images of CLADO's pairs")
    parser.add_argument("--train", type=int, default=2048)
    parser.add_argument("--val", type=int, default=2000)
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    data = ImageFolderDataModule(args.data, num_classes=10, augment="none", memory=False)
    data.setup("fit")
    dataset = data.train_dataloader().dataset
    calibration = draw(dataset, args.images, 64)
    images, val = draw(dataset, args.train, BATCH, seed=1), draw(data.val_dataloader().dataset, args.val, 250)
    net = getattr(models, args.network)(weights=args.weights).eval()
    float_state = {k: v.clone() for k, v in net.state_dict().items()}
    file = RESULTS / "peers.json"
    report: dict[str, Any] = json.loads(file.read_text("utf-8")) if file.is_file() else {}
    part = report.setdefault(args.network, {"rows": {}})
    part |= {"mean_bits": args.bits, "train_images": args.train, "val_images": args.val}
    rows: dict[str, Any] = part["rows"]
    part.setdefault("float", accuracy(net, val))

    def keep() -> None:
        part["rows"] = {t: rows[t] for t in TITLES if t in rows}
        file.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        file.with_suffix(".md").write_text(text(report), encoding="utf-8")

    problem, found = plans_here(net, calibration, args.bits, 0 if "clado" in rows else args.pairs)
    for tool, made in found.items():
        rows.setdefault(tool, made)
    keep()
    for tool in set(TITLES) - set(rows):
        asked = args.plans / f"{args.network}_{tool}.json"
        if asked.is_file() and tool not in rows:
            rows[tool] = json.loads(asked.read_text("utf-8"))
    for seed in range(args.seeds):
        for row in rows.values():
            if "error" in row or str(seed) in row.setdefault("after", {}):
                continue
            weights = {s.name: row["bits"][s.name] for s in problem.sites if s.kind == "weight"}
            plan = hl.select(problem, None, "manual", bits=weights)
            hl.quantize(net, plan)
            row["bytes"] = plan.costs["weight_bytes"]
            if "before" not in row:
                row["before"] = accuracy(net, val)
            fine_tuned(net, images, seed)
            row["after"][str(seed)] = accuracy(net, val)
            unquantize(net)
            net.load_state_dict(float_state)
            net.eval()
            keep()
    keep()
    print(text(report))


if __name__ == "__main__":
    main()
