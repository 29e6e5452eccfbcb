"""Gauss-Newton or the true Hessian: which traces tell what rounding does to networks that are not piecewise linear?

    OMP_NUM_THREADS=1 python benchmarks/estimators.py [--seeds 0 1] [--out FOLDER]

Small networks (attention, squeeze-and-excitation with SiLU, GELU, and ReLU as a control) are trained on scikit-learn's
digits, for long and for three epochs only. On 256 training images: traces of both kinds (``estimator="exact"`` is
Gauss-Newton without error, ``estimator="hessian"`` the true Hessian), half of Ω by each, and what happens when one site
alone is quantized: to the cross-entropy, and to KL(float || quantized). Spearman's rank correlation of the two, over
all sites and widths, and the mean over single widths. Then plans under one size, chosen by either kind of traces: KL,
loss and error on 540 held-out images, without fine-tuning. Networks that are in the results are not trained again.
Results: benchmarks/results/estimators.{json,md}; six minutes on one core.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import nn
from torch.nn import functional as F

from hawq_lightning import Problem, SiteTable, candidates, measure, select, sites
from hawq_lightning.data import DigitsDataModule
from hawq_lightning.quantization import loss_of_plan, loss_per_site
from hawq_lightning.sensitivity import Sensitivity, guarded_mean_traces

RESULTS = Path(__file__).resolve().parent / "results"
ESTIMATORS = ("ggn", "hessian")
SITE_BITS, PLAN_BITS, BUDGETS = (2, 3, 4, 6), (2, 3, 4, 6, 8), tuple(f"{n}x" for n in range(6, 14))
IMAGES, PROBES = 256, 24
LONG, SHORT = 50, 3  # epochs
Batch = Sequence[torch.Tensor]
Row = dict[str, Any]


class Attention(nn.Module):
    """Multi-head self-attention out of four linear layers."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.proj = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Tokens to tokens."""
        q, k, v = (f(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """A transformer's block, norms first."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(width), Attention(width, 4)
        self.norm2, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Tokens to tokens."""
        x = x + self.attention(self.norm1(x))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class VisionTransformer(nn.Module):
    """16 patches of 2x2 pixels, three blocks, mean over the tokens."""

    def __init__(self, width: int = 32, depth: int = 3) -> None:
        super().__init__()
        self.patch, self.position = nn.Conv2d(1, width, 2, stride=2), nn.Parameter(0.02 * torch.randn(16, width))
        self.blocks = nn.Sequential(*(Block(width) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits."""
        return self.head(self.norm(self.blocks(self.patch(x).flatten(2).mT + self.position)).mean(1))


class Gated(nn.Module):
    """MobileNet's inverted bottleneck with SiLU and squeeze-and-excitation."""

    def __init__(self, width: int) -> None:
        super().__init__()
        inner = 2 * width
        self.expand, self.norm1 = nn.Conv2d(width, inner, 1, bias=False), nn.BatchNorm2d(inner)
        self.depthwise = nn.Conv2d(inner, inner, 3, padding=1, groups=inner, bias=False)
        self.norm2 = nn.BatchNorm2d(inner)
        self.squeeze, self.excite = nn.Conv2d(inner, inner // 4, 1), nn.Conv2d(inner // 4, inner, 1)
        self.project, self.norm3 = nn.Conv2d(inner, width, 1, bias=False), nn.BatchNorm2d(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Feature maps of the same shape."""
        y = F.silu(self.norm2(self.depthwise(F.silu(self.norm1(self.expand(x))))))
        gate = torch.sigmoid(self.excite(F.silu(self.squeeze(y.mean((2, 3), keepdim=True)))))
        return x + self.norm3(self.project(y * gate))


def gated() -> nn.Module:
    stem = [nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.SiLU()]
    return nn.Sequential(*stem, Gated(16), nn.MaxPool2d(2), Gated(16), Gated(16), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                         nn.Linear(16, 10))  # fmt: skip


def plain(activation: type[nn.Module]) -> nn.Module:
    """Convolutions and a perceptron, with one non-linearity throughout."""
    layers: list[nn.Module] = []
    for i, (a, b) in enumerate(((1, 12), (12, 16), (16, 24))):
        layers += [nn.Conv2d(a, b, 3, stride=1 + (i > 0), padding=1, bias=False), nn.BatchNorm2d(b), activation()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(96, 48), activation(), nn.Linear(48, 32), activation(),
                         nn.Linear(32, 10))  # fmt: skip


NETWORKS = {
    "ViT": VisionTransformer,
    "SiLU and SE": gated,
    "GELU": lambda: plain(nn.GELU),
    "ReLU": lambda: plain(nn.ReLU),
}


def train(net: nn.Module, data: DigitsDataModule, epochs: int) -> None:
    """AdamW, one cycle."""
    loader = data.train_dataloader()
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=epochs * len(loader))
    net.train()
    for _ in range(epochs):
        for x, y in loader:
            optimizer.zero_grad()
            F.cross_entropy(net(x), y).backward()
            optimizer.step()
            schedule.step()
    net.eval()


def cross_entropy(net: nn.Module, batch: Batch) -> torch.Tensor:
    return F.cross_entropy(net(batch[0]), batch[1])


def divergence(net: nn.Module, batch: Batch) -> torch.Tensor:
    """KL(float || quantized); the float network's log-probabilities are in the batch."""
    return F.kl_div(F.log_softmax(net(batch[0]), 1), batch[2], reduction="batchmean", log_target=True)


def errors(net: nn.Module, batch: Batch) -> torch.Tensor:
    return (net(batch[0]).argmax(1) != batch[1]).float().mean()


TARGETS = {"loss": cross_entropy, "kl": divergence}


def with_float_outputs(net: nn.Module, batch: Batch) -> Batch:
    with torch.no_grad():
        return (*batch, F.log_softmax(net(batch[0]), 1))


def by_site(net: nn.Module, batch: Batch, table: SiteTable, traces: dict[str, Sensitivity]) -> list[Row]:
    """Half of Ω by either kind of traces, and the measured changes, for every site and width alone."""
    weighed = {
        name: candidates(net, [batch], found, table, cross_entropy, weight_bits=SITE_BITS, activation_bits=SITE_BITS,
                         input_bits=None)
        for name, found in traces.items()
    }  # fmt: skip
    measured = {what: loss_per_site(net, [batch], target, table, weighed["ggn"]) for what, target in TARGETS.items()}
    rows = []
    for loss, kl in zip(measured["loss"], measured["kl"]):
        row = {"site": loss["site"], "kind": loss["kind"], "bits": loss["bits"],
               "loss": loss["measured"], "kl": kl["measured"]}  # fmt: skip
        for name, choices in weighed.items():
            option = next(o for o in choices[row["site"]] if o.bits == row["bits"])
            row[name] = option.omega / 2
        rows.append(row)
    return rows


def by_plan(
    net: nn.Module, batch: Batch, held_out: Batch, table: SiteTable, traces: dict[str, Sensitivity]
) -> list[Row]:
    """Weights quantized by plans of one size, chosen by either kind of traces."""
    rows = []
    chosen = {}
    for name, found in traces.items():
        choices = candidates(net, [batch], found, table, cross_entropy, weight_bits=PLAN_BITS, activation_bits=None)
        problem = Problem(table, choices, found)
        chosen |= {(name, budget): select(problem, budget) for budget in BUDGETS}
    for what, target in {**TARGETS, "error": errors}.items():
        with loss_of_plan(net, [held_out], target) as measure_plan:
            found = {key: measure_plan(plan) for key, plan in chosen.items()}
        rows += [{"estimator": n, "budget": b, "what": what, "value": v} for (n, b), v in found.items()]
    return rows


def examine(name: str, epochs: int, seed: int) -> dict[str, Any]:
    """One trained network."""
    began = time.process_time()
    torch.manual_seed(seed)
    net = NETWORKS[name]()
    moving, still = DigitsDataModule(batch_size=64, shift=1), DigitsDataModule(batch_size=IMAGES, shift=0)
    moving.setup()
    still.setup()
    train(net, moving, epochs)
    torch.manual_seed(seed)
    batch = with_float_outputs(net, next(iter(still.train_dataloader())))
    held_out = with_float_outputs(net, [torch.cat(part) for part in zip(*still.val_dataloader())])
    table = sites(net, batch[0])
    trained = time.process_time()
    shared = {"sites": table, "progress": False, "seed": seed}
    traces = {
        "ggn": measure(net, [batch], cross_entropy, estimator="exact", **shared),
        "hessian": measure(net, [batch], cross_entropy, estimator="hessian", rtol=0.02, max_probes=PROBES, **shared),
    }
    measured = time.process_time()
    _, floored = guarded_mean_traces(traces["hessian"])
    found = {
        "sites": [{"site": r.name, "kind": r.kind, "ggn": r.trace, "hessian": traces["hessian"][r.name].trace,
                   "stderr": traces["hessian"][r.name].stderr} for r in traces["ggn"]],
        "floored": len(floored), "estimator": traces["hessian"].settings["estimator"],
        "rows": by_site(net, batch, table, traces), "plans": by_plan(net, batch, held_out, table, traces),
    }  # fmt: skip
    with torch.no_grad():
        figures = {"loss": float(cross_entropy(net, batch)), "held_out_error": float(errors(net, held_out))}
    times = {"train": trained - began, "traces": measured - trained, "rest": time.process_time() - measured}
    return {
        "network": f"{name}, {epochs} epochs",
        "seed": seed,
        **figures,
        "seconds": {k: round(v, 1) for k, v in times.items()},
        **found,
    }


def rank(rows: Sequence[Row], estimator: str, target: str) -> float:
    """Spearman's rank correlation of half of Ω with the measured change."""
    return float(spearmanr([r[estimator] for r in rows], [r[target] for r in rows]).statistic)


def ranks(run: dict[str, Any], kind: str, estimator: str, target: str) -> tuple[float, float]:
    """Over all sites of a kind at all widths, and the mean over single widths."""
    rows = [r for r in run["rows"] if r["kind"] == kind]
    within = [rank([r for r in rows if r["bits"] == b], estimator, target) for b in SITE_BITS]
    return rank(rows, estimator, target), float(np.mean(within))


def plan_quality(run: dict[str, Any], estimator: str, what: str) -> float:
    """Mean over the budgets; of KL and of the loss the geometric one."""
    values = [r["value"] for r in run["plans"] if r["estimator"] == estimator and r["what"] == what]
    return float(np.mean(values) if what == "error" else np.exp(np.mean(np.log(values))))


def mean_quality(runs: Sequence[dict[str, Any]], what: str, estimator: str) -> float:
    """Over networks as over budgets."""
    values = [plan_quality(r, estimator, what) for r in runs]
    return float(np.mean(values) if what == "error" else np.exp(np.mean(np.log(values))))


def both(value: Callable[[str], float], form: str) -> str:
    """A cell of a table: by Gauss-Newton traces / by true ones."""
    return " / ".join(format(value(estimator), form) for estimator in ESTIMATORS)


def ranks_of(runs: Sequence[dict[str, Any]], kind: str, target: str, one_width: bool) -> str:
    """A cell of rank correlations, means over the networks."""
    return both(lambda e: float(np.mean([ranks(r, kind, e, target)[one_width] for r in runs])), ".2f")


def page(runs: Sequence[dict[str, Any]], facts: dict[str, Any]) -> str:
    """The tables."""
    groups = {n: [r for r in runs if r["network"] == n] for n in dict.fromkeys(r["network"] for r in runs)}
    counts = sorted({len(g) for g in groups.values()})
    lines = ["# Gauss-Newton or the true Hessian", "",
             f"{facts['date']}, torch {facts['torch']}. Made by `benchmarks/estimators.py`, whose head says how; means "
             f"over {' or '.join(map(str, counts))} networks a row. Pairs: by Gauss-Newton traces / by true ones.", "",
             "## One site quantized alone: Spearman of ½Ω with what was measured", "",
             "| network | weights: KL | KL, one width | loss | activations: KL | KL, one width | loss |",
             "|---|---:|---:|---:|---:|---:|---:|"]  # fmt: skip
    for name, some in groups.items():
        columns = (("kl", False), ("kl", True), ("loss", False))
        cells = [ranks_of(some, kind, *column) for kind in ("weight", "activation") for column in columns]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += ["", f"## Traces, and plans of one size for the weights ({', '.join(BUDGETS)})", "",
              "True traces over Gauss-Newton's, weights: least, median, largest. KL, loss and error of the plans on "
              "held-out images, without fine-tuning, as means over the budgets (KL and loss: geometric); the last "
              "column counts the plans that had the lower KL of the two.", "",
              "| network | float error | true / Gauss-Newton | KL | loss | error | lower KL |",
              "|---|---:|---:|---:|---:|---:|---:|"]  # fmt: skip
    for name, some in groups.items():
        ratios = [s["hessian"] / s["ggn"] for r in some for s in r["sites"] if s["kind"] == "weight"]
        cells = [f"{np.mean([r['held_out_error'] for r in some]):.1%}",
                 f"{min(ratios):.2f}, {np.median(ratios):.2f}, {max(ratios):.2f}"]  # fmt: skip
        cells += [both(partial(mean_quality, some, what), form)
                  for what, form in (("kl", ".4f"), ("loss", ".4f"), ("error", ".1%"))]  # fmt: skip
        cells.append(f"{both(partial(wins, some), 'd')} of {len(BUDGETS) * len(some)}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def text_of(facts: dict[str, Any], runs: Sequence[dict[str, Any]]) -> str:
    """JSON with a line for each network."""
    return json.dumps({"facts": facts})[:-1] + ', "runs": [\n' + ",\n".join(map(json.dumps, runs)) + "\n]}\n"


def wins(runs: Sequence[dict[str, Any]], estimator: str) -> int:
    """Networks and budgets at which this estimator's plan has the lower KL."""
    count = 0
    for run in runs:
        kl = {(r["estimator"], r["budget"]): r["value"] for r in run["plans"] if r["what"] == "kl"}
        other = next(e for e in ESTIMATORS if e != estimator)
        count += sum(kl[estimator, b] < kl[other, b] for b in BUDGETS)
    return count


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    torch.set_num_threads(1)
    path = given.out / "estimators.json"
    runs: list[dict[str, Any]] = json.loads(path.read_text())["runs"] if path.is_file() else []
    wanted = [(name, epochs, seed) for seed in given.seeds for name in NETWORKS for epochs in (LONG, SHORT)
              if (name, epochs) != ("ReLU", SHORT)]  # fmt: skip
    facts = {"date": time.strftime("%Y-%m-%d"), "torch": torch.__version__, "images": IMAGES, "probes": PROBES}
    for name, epochs, seed in wanted:
        if any(r["network"] == f"{name}, {epochs} epochs" and r["seed"] == seed for r in runs):
            continue
        runs.append(examine(name, epochs, seed))
        print(runs[-1]["network"], seed, runs[-1]["seconds"], flush=True)
        path.write_text(text_of(facts, runs), encoding="utf-8")
    (given.out / "estimators.md").write_text(page(runs, facts), encoding="utf-8")
    print(page(runs, facts))


if __name__ == "__main__":
    main()
