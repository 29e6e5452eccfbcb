"""What a plan's prediction is worth before and after fine-tuning, on images held out of the training split.

    python recipes/compare/explain.py recipes/compare/cifar10.yaml OUT DATA=/data WEIGHTS=/data/resnet20_cifar10.pt

For the settings asked for, the plans of a sweep's methods and random ones of the same size each give four losses: right
after quantizing; with the norm of every channel's weights restored (rounding with least squared error shrinks it); with
BatchNorm's statistics measured again (nothing learned); after a short fine-tuning (``--steps``, as in the sweep). They
are ranked against what could have predicted them:

- ``omega``: Σ mean trace ‖ΔW‖², HAWQ-V2's; ``l2``: Σ ‖ΔW‖²; ``eigenvalue``: Σ λ₁ ‖ΔW‖² (where the sweep has them)
- ``alone``: Σ of the loss changes measured with one weight quantized at a time, what a perfect Ω would say
- ``two``: the share of weights that have the fewest bits of all plans

The reference's plan is fine-tuned with several seeds, so that the table can say what is noise. ``--curve`` also follows
some methods through the whole fine-tuning. Stopped, the same command goes on. Written to OUT: explain.{json,md,png}.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule
from scipy.stats import spearmanr
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent))
from sweep import Design, composed, needs

from hawq_lightning import Plan, quantize, select
from hawq_lightning.cli.parts import make_data, make_task
from hawq_lightning.errors import HawqError
from hawq_lightning.plan import write_text
from hawq_lightning.quantization import loss_check
from hawq_lightning.quantization.kernels import along
from hawq_lightning.quantization.post_training import reestimate_batchnorm
from hawq_lightning.quantization.twins import QuantizedLayer
from hawq_lightning.report.card import markdown_table
from hawq_lightning.report.style import BLUE, GREEN, ORANGE, SOFT, Drawing, canvas, log_scale
from hawq_lightning.selection import Problem, problem_of
from hawq_lightning.site_table import SiteTable
from hawq_lightning.tasks.optimizers import make_optimizer

STAGES = {"quantized": "after quantizing", "norm": "norms restored", "batchnorm": "BatchNorm measured again",
          "trained": "after {} steps"}  # fmt: skip
PREDICTORS = {
    "omega": "Ω, mean trace · ‖ΔW‖²", "l2": "‖ΔW‖²", "eigenvalue": "λ₁ ‖ΔW‖²",
    "alone": "loss changes measured one by one", "two": "share of weights with the fewest bits",
}  # fmt: skip
MARKS = (0, 5, 10, 20, 40, 80, 160)
Batches = Sequence[tuple[Tensor, Tensor]]


class Task:
    """The sweep's network and data, evaluated on what is held out of the training split.

    Args:
        design: the sweep.
        setting: whose configuration is meant; settings differ in their plans only.
        images: how many to score on.
    """

    def __init__(self, design: Design, setting: str, images: int) -> None:
        tuning = [o for o in design.asked["tuning"]["overrides"] if o.startswith("data.evaluate_on=")]
        given = [*design.common, *design.asked["settings"][setting]["overrides"], *tuning, "paths.output_dir=''"]
        self.cfg = composed(given)
        self.mixed = "trainer=cpu_mixed" in design.asked["train"]
        data = make_data(self.cfg)
        data.setup("fit")
        self._loader = data.train_dataloader()
        self.held_out = _spread(data.val_dataloader().dataset, images)
        if "augment" in self.cfg.data:
            still = self.cfg.copy()
            still.data.augment = "none"
            data = make_data(still)
            data.setup("fit")
        self.still = _spread(data.train_dataloader().dataset, 1024)

    def network(self, plan: Plan | None = None) -> LightningModule:
        """With its float weights, quantized if there is a plan."""
        task = make_task(self.cfg).to(memory_format=torch.channels_last).eval()
        return task if plan is None else quantize(task, plan)

    def stages(self, plan: Plan, lr: float, steps: int) -> dict[str, Any]:
        """The four scores of a plan."""
        net = self.network(plan)
        found = {"quantized": score(net, self.held_out)}
        reestimate_batchnorm(net, self.still)
        found["batchnorm"] = score(net, self.held_out)
        found["norm"] = score(with_norms(self.network(plan)), self.held_out)
        found["trained"] = self.fine_tune(plan, lr, steps)[-1]
        return found

    def fine_tune(
        self, plan: Plan, lr: float, steps: int, seed: int = 1, marks: Sequence[int] = ()
    ) -> list[dict[str, float]]:
        """As the sweep does it; scores at the marks on the way, and at the end."""
        torch.manual_seed(seed)
        net, how = self.network(plan), self.cfg.task
        made = make_optimizer(
            net.parameters(), how.optimizer, lr, how.momentum, how.weight_decay, how.schedule, steps
        )  # fmt: skip
        found = []
        for step, (x, y) in enumerate(itertools.islice(self._endless(), steps)):
            if step in marks:
                found.append({"step": step, **score(net, self.held_out)})
            net.train()
            made["optimizer"].zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=self.mixed):
                loss = F.cross_entropy(net(x), y)
            loss.backward()
            made["optimizer"].step()
            made["lr_scheduler"]["scheduler"].step()
        return [*found, {"step": steps, **score(net, self.held_out)}]

    def _endless(self) -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            for x, y in self._loader:
                yield x.to(memory_format=torch.channels_last), y

    def one_by_one(self, problem: Problem) -> dict[str, float]:
        """``site@bits`` -> loss change with that weight alone quantized, on 512 training images."""
        weights = tuple(s for s in problem.sites if s.kind == "weight")
        table = SiteTable(weights, problem.layers)
        rows = loss_check(
            self.network(), self.still[:4], lambda m, b: F.cross_entropy(m(b[0]), b[1]), table, problem.options
        )  # fmt: skip
        return {f"{r['site']}@{r['bits']}": r["measured"] for r in rows}


@torch.no_grad()
def with_norms(net: LightningModule) -> LightningModule:
    """Weights as quantized, but as long as they were, channel by channel; activations stay quantized."""
    for layer in net.modules():
        if isinstance(layer, QuantizedLayer):
            rounded = layer.quantized_weight
            norms = [w.flatten(1).norm(dim=1).clamp_min(1e-30) for w in (layer.weight, rounded)]
            longer = along(norms[0] / norms[1], rounded, 0)
            layer.weight.copy_(rounded * longer)
            layer.weight_quantizer.disarm()
    return net


def _spread(dataset: Any, images: int) -> list[tuple[Tensor, Tensor]]:
    """Batches of that many images, taken evenly from the whole, whose classes come one after the other."""
    pick = np.linspace(0, len(dataset) - 1, min(images, len(dataset))).round().astype(int)
    items = [dataset[int(i)] for i in pick]
    stacked = torch.stack([x for x, _ in items]).to(memory_format=torch.channels_last)
    return list(zip(stacked.split(128), torch.tensor([int(y) for _, y in items]).split(128)))


@torch.no_grad()
def score(net: nn.Module, batches: Batches) -> dict[str, float]:
    """Mean loss and accuracy, in evaluation mode and float32."""
    net.eval()
    logits = torch.cat([net(x) for x, _ in batches])
    labels = torch.cat([y for _, y in batches])
    right = (logits.argmax(1) == labels).float().mean()
    return {"loss": float(F.cross_entropy(logits, labels)), "accuracy": float(right)}


def predictions(plan: Plan, eigenvalues: Mapping[str, float] | None, alone: Mapping[str, float]) -> dict[str, float]:
    """What could have been said beforehand; weights only, since activations are alike in all plans of a setting."""
    fewest = min(o.bits for s in plan.weights for o in s.options)
    found = {
        "omega": sum(s.omega or 0.0 for s in plan.weights),
        "l2": sum(s.perturbation or 0.0 for s in plan.weights),
        "alone": sum(alone[f"{s.name}@{s.bits}"] for s in plan.weights),
        "two": sum(s.numel for s in plan.weights if s.bits == fewest) / sum(s.numel for s in plan.weights),
    }
    if eigenvalues:
        found["eigenvalue"] = sum(eigenvalues[s.name] * (s.perturbation or 0.0) for s in plan.weights)
    return found


class Record:
    """The JSON file that is added to, so that nothing is done twice."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}

    def once(self, key: str, make: Any) -> Any:
        """What ``make()`` gave, this time or an earlier one."""
        if key not in self.found:
            start = time.perf_counter()
            self.found[key] = make()
            write_text(self.path, json.dumps(self.found, indent=1))
            print(f"{key}: {time.perf_counter() - start:.0f} s", flush=True)
        return self.found[key]


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


def _shown(found: Mapping[str, float]) -> str:
    return f"{found['loss']:.3f} ({100 * found['accuracy']:.1f}%)"


def draw(found: Mapping[str, Any], settings: Mapping[str, str], steps: int) -> Drawing:
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
    return Drawing("explain", "Predicted, and what is left of it", "", "", figure, columns, rows)


def explain(design: Design, settings: Sequence[str], asked: argparse.Namespace) -> str:
    """Measure what is not yet in ``explain.json``, and write the page and the picture."""
    record, labels = Record(design.out / "explain.json"), {s: design.asked["settings"][s]["label"] for s in settings}
    reference = design.asked["reference"]
    for setting in settings:
        task = Task(design, setting, asked.images)
        base = design.asked["settings"][setting].get("options_of", setting)
        problem = problem_of(Plan.load(design.plan(base, reference, 1).file))
        alone = record.once(f"{base}/alone", partial(task.one_by_one, problem))
        plans, eigenvalues = known_plans(design, setting)
        budget = plans[reference].budget
        for i in range(asked.plans):
            plans[f"random {i + 1}"] = select(problem, budget, "random", seed=100 + i)
        for name, plan in plans.items():
            row = record.once(f"{setting}/plan/{name}", partial(task.stages, plan, asked.lr, asked.steps))
            row["said"] = predictions(plan, eigenvalues, alone)
        for seed in range(2, 2 + asked.seeds):
            again = partial(task.fine_tune, plans[reference], asked.lr, asked.steps, seed)
            record.once(f"{setting}/seed/{seed}", again)
        for method in filter(None, asked.curve.split(",")):
            whole = partial(task.fine_tune, plans[method], asked.lr, asked.whole, 1, MARKS)
            record.once(f"{setting}/curve/{method}", whole)
    text = "\n".join(tables(record.found, labels, asked.steps)) + "\n"
    write_text(record.path, json.dumps(record.found, indent=1))
    write_text(design.out / "explain.md", text)
    (design.out / "explain.png").write_bytes(draw(record.found, labels, asked.steps).png())
    return text


def known_plans(design: Design, setting: str) -> tuple[dict[str, Plan], Mapping[str, float]]:
    """The plans that the sweep has by now, drawn ones left out, and top eigenvalues if it measured any."""
    plans: dict[str, Plan] = {}
    eigenvalues: Mapping[str, float] = {}
    for method in design.asked["settings"][setting]["methods"]:
        job = design.plan(setting, method, 1)
        for one in (*needs(job), job):
            if one.done:
                eigenvalues = Plan.load(one.file).settings.get("eigenvalues", eigenvalues)
        if job.done and not design.asked["methods"][method].get("draws"):
            plans[method] = Plan.load(job.file)
    if design.asked["reference"] not in plans:
        raise HawqError(f"{design.out} has no plan of {design.asked['reference']} for {setting}; run sweep.py first.")
    return plans, eigenvalues


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("design", type=Path, help="the YAML file of the sweep")
    parser.add_argument("out", type=Path, help="folder of the sweep")
    parser.add_argument("given", nargs="*", help="NAME=value of what the file leaves open")
    parser.add_argument("--settings", default="w3a8,w2.5a8")
    parser.add_argument("--plans", type=int, default=16, help="random plans a setting")
    parser.add_argument("--steps", type=int, default=39, help="of the short fine-tuning: one epoch of 5,000 images")
    parser.add_argument("--lr", type=float, default=0.01, help="its peak learning rate")
    parser.add_argument("--images", type=int, default=2000, help="of those held out, to score on")
    parser.add_argument("--seeds", type=int, default=4, help="more seeds for the reference")
    parser.add_argument("--curve", default="", help="methods to follow through the whole fine-tuning")
    parser.add_argument("--whole", type=int, default=312, help="its steps")
    asked = parser.parse_args(arguments)
    torch.set_num_threads(1)
    try:
        design = Design(asked.design, asked.out, dict(g.split("=", 1) for g in asked.given))
        print(explain(design, asked.settings.split(","), asked))
    except HawqError as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
