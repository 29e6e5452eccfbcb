"""What a plan's prediction is worth before and after fine-tuning, on images held out of the training split.

    python recipes/compare/explain.py recipes/compare/cifar10.yaml OUT DATA=/data WEIGHTS=/data/resnet20_cifar10.pt

For the settings asked for, the plans of a sweep's methods and as many random ones of the same size each give three
losses: right after quantizing; with BatchNorm's statistics measured again (nothing learned); after a short fine-tuning
(``--steps``, as in the sweep: SGD, one-cycle, bfloat16). They are ranked against what could have predicted them:

- ``omega``: Σ mean trace ‖ΔW‖², HAWQ-V2's; ``l2``: Σ ‖ΔW‖²; ``eigenvalue``: Σ λ₁ ‖ΔW‖² (where the sweep has them)
- ``alone``: Σ of the loss changes measured with one weight quantized at a time, what a perfect Ω would say
- ``two``: the share of weights that have the fewest bits of all plans

The reference's plan is fine-tuned with several seeds, so that the table can say what is noise. ``--curve`` also follows
some methods through the whole fine-tuning. Stopped, the same command goes on. Written to OUT: explain.{json,md,png}.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent))
from sweep import Design, needs

from hawq_lightning import Plan, quantize, select
from hawq_lightning.data.image_folder import ImageFolderDataModule
from hawq_lightning.errors import HawqError
from hawq_lightning.models.resnet20 import resnet20
from hawq_lightning.plan import write_text
from hawq_lightning.quantization import loss_check
from hawq_lightning.quantization.post_training import reestimate_batchnorm
from hawq_lightning.report.card import markdown_table
from hawq_lightning.report.style import BLUE, ORANGE, SOFT, Drawing, canvas
from hawq_lightning.selection import Problem, problem_of
from hawq_lightning.site_table import SiteTable
from hawq_lightning.tasks.optimizers import make_optimizer

STAGES = {"quantized": "after quantizing", "batchnorm": "BatchNorm measured again", "trained": "after {} steps"}
PREDICTORS = {
    "omega": "Ω, mean trace · ‖ΔW‖²", "l2": "‖ΔW‖²", "eigenvalue": "λ₁ ‖ΔW‖²",
    "alone": "loss changes measured one by one", "two": "share of weights with the fewest bits",
}  # fmt: skip
MARKS = (0, 5, 10, 20, 40, 80, 160)
SEEDS = 4
Batches = Sequence[tuple[Tensor, Tensor]]


class Images:
    """The sweep's own parts: training subset, and images held out of the training split."""

    def __init__(self, root: str, evaluated: int) -> None:
        parts = {"held_out": 5000, "train_subset": 20_000, "evaluate_on": "held_out"}
        data = ImageFolderDataModule(root, augment="shift_flip", memory=True, num_classes=10, **parts)  # type: ignore[arg-type]
        data.setup()
        self.train, held_out = data._sets["train"], data._sets["val"]
        pick = np.linspace(0, len(held_out) - 1, evaluated).round().astype(int)  # type: ignore[arg-type]
        self.held_out = _batches([held_out[i] for i in pick])
        plain = ImageFolderDataModule(root, augment="none", memory=True, num_classes=10, **parts)  # type: ignore[arg-type]
        plain.setup()
        still = plain._sets["train"]
        some = np.linspace(0, len(still) - 1, 1024).round().astype(int)  # type: ignore[arg-type]
        self.still = _batches([still[i] for i in some])

    def steps(self, count: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Augmented training batches of 128, epoch after epoch."""
        order = torch.Generator().manual_seed(seed)
        torch.manual_seed(seed)  # of the augmentation
        while True:
            shuffled = torch.randperm(len(self.train), generator=order).tolist()  # type: ignore[arg-type]
            for start in range(0, len(shuffled) - 127, 128):
                if not count:
                    return
                count -= 1
                yield _batches([self.train[i] for i in shuffled[start : start + 128]])[0]


def _batches(items: Sequence[tuple[Tensor, int]]) -> list[tuple[Tensor, Tensor]]:
    images = torch.stack([x for x, _ in items]).to(memory_format=torch.channels_last)
    return list(zip(images.split(128), torch.tensor([y for _, y in items]).split(128)))


@torch.no_grad()
def score(net: nn.Module, batches: Batches) -> dict[str, float]:
    """Mean loss and accuracy, in evaluation mode and float32."""
    net.eval()
    logits = torch.cat([net(x) for x, _ in batches])
    labels = torch.cat([y for _, y in batches])
    return {
        "loss": float(F.cross_entropy(logits, labels)),
        "accuracy": float((logits.argmax(1) == labels).float().mean()),
    }


def fine_tune(
    net: nn.Module, images: Images, lr: float, steps: int, seed: int, marks: Sequence[int] = ()
) -> list[dict[str, float]]:
    """As the sweep does it; scores at the marks on the way."""
    made = make_optimizer(net.parameters(), "sgd", lr, 0.9, 5e-4, "onecycle", steps)
    optimizer, schedule = made["optimizer"], made["lr_scheduler"]["scheduler"]
    found = []
    for step, (x, y) in enumerate(images.steps(steps, seed)):
        if step in marks:
            found.append({"step": step, **score(net, images.held_out)})
        net.train()
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(net(x), y)
        loss.backward()
        optimizer.step()
        schedule.step()
    return [*found, {"step": steps, **score(net, images.held_out)}]


def network(weights: str, plan: Plan) -> nn.Module:
    """The float network, quantized."""
    net = resnet20(weights=weights)
    quantize(net, plan)
    return net.to(memory_format=torch.channels_last)


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


def one_by_one(weights: str, images: Images, problem: Problem) -> dict[str, float]:
    """``site@bits`` -> loss change with that weight alone quantized, on 512 training images."""
    some = images.still[:4]
    rows = loss_check(
        resnet20(weights=weights).eval(), some, lambda m, b: F.cross_entropy(m(b[0]), b[1]),
        SiteTable(tuple(s for s in problem.sites if s.kind == "weight"), problem.layers, ()), problem.options,
    )  # fmt: skip
    return {f"{r['site']}@{r['bits']}": r["measured"] for r in rows}


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


def stages(weights: str, plan: Plan, images: Images, lr: float, steps: int, seed: int = 1) -> dict[str, Any]:
    """The three scores of a plan."""
    net = network(weights, plan)
    found = {"quantized": score(net, images.held_out)}
    reestimate_batchnorm(net, images.still)
    found["batchnorm"] = score(net, images.held_out)
    found["trained"] = fine_tune(network(weights, plan), images, lr, steps, seed)[-1]
    return found


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
        cells.append(["*standard deviation of the loss*", *(f"{np.std(losses[s], ddof=1):.4f}" for s in names)])
        text += [
            f"## {label}",
            "",
            f"Spearman's rank correlation with the held-out loss of {len(drawn)} random plans:",
            "",
        ]
        text += [*markdown_table(["predictor", *names.values()], cells), ""]
        again = [v for k, v in found.items() if k.startswith(f"{setting}/seed/")]
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
    colours = {"quantized": BLUE, "batchnorm": SOFT, "trained": ORANGE}
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
            ax.legend()
        axes[-1].set_xlabel("Ω of the weights", color=SOFT)
    columns = ["setting", "plan", "stage", "omega", "loss"]
    return Drawing("explain", "Predicted, and what is left of it", "", "", figure, columns, rows)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("design", type=Path, help="the YAML file of the sweep")
    parser.add_argument("out", type=Path, help="folder of the sweep")
    parser.add_argument("given", nargs="*", help="NAME=value of what the file leaves open")
    parser.add_argument("--settings", default="w3a8,w2.5a8")
    parser.add_argument("--plans", type=int, default=16, help="random plans a setting")
    parser.add_argument("--steps", type=int, default=39, help="of the short fine-tuning: one epoch of 5,000 images")
    parser.add_argument("--lr", type=float, default=0.01)
    parser.add_argument("--images", type=int, default=2000, help="of those held out, to score on")
    parser.add_argument("--curve", default="", help="methods to follow through 312 steps")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    try:
        given = dict(g.split("=", 1) for g in asked.given)
        design, weights = Design(asked.design, asked.out, given), given["WEIGHTS"]
        record, images = Record(asked.out / "explain.json"), Images(given["DATA"], asked.images)
        settings = {s: design.asked["settings"][s]["label"] for s in asked.settings.split(",")}
        for setting in settings:
            reference = design.asked["reference"]
            base = design.asked["settings"][setting].get("options_of", setting)
            problem = problem_of(Plan.load(design.plan(base, reference, 1).file))
            alone = record.once(f"{base}/alone", partial(one_by_one, weights, images, problem))
            plans: dict[str, Plan] = {}
            eigenvalues: Mapping[str, float] | None = None
            for method in design.asked["settings"][setting]["methods"]:
                job = design.plan(setting, method, 1)
                if job.done and not design.asked["methods"][method].get("draws"):
                    plans[method] = Plan.load(job.file)
                for needed in [*needs(job), job]:
                    if needed.done and "eigenvalues" in (known := Plan.load(needed.file).settings):
                        eigenvalues = known["eigenvalues"]
            budget = Plan.load(design.plan(setting, reference, 1).file).budget
            for i in range(asked.plans):
                plans[f"random {i + 1}"] = select(problem, budget, "random", seed=100 + i)
            for name, plan in plans.items():

                def measured(plan: Plan = plan) -> dict[str, Any]:
                    return stages(weights, plan, images, asked.lr, asked.steps)

                row = record.once(f"{setting}/plan/{name}", measured)
                row["said"] = predictions(plan, eigenvalues, alone)
            for seed in range(2, 2 + SEEDS):
                net = partial(network, weights, plans[reference])
                record.once(f"{setting}/seed/{seed}",
                            lambda s=seed, net=net: fine_tune(net(), images, asked.lr, asked.steps, s)[-1])  # fmt: skip
            for method in filter(None, asked.curve.split(",")):

                def followed(plan: Plan = plans[method]) -> list[dict[str, float]]:
                    return fine_tune(network(weights, plan), images, asked.lr, 312, 1, MARKS)

                record.once(f"{setting}/curve/{method}", followed)
    except HawqError as error:
        raise SystemExit(f"error: {error}") from None
    text = "\n".join(tables(record.found, settings, asked.steps))
    write_text(record.path, json.dumps(record.found, indent=1))
    write_text(asked.out / "explain.md", text + "\n")
    (asked.out / "explain.png").write_bytes(draw(record.found, settings, asked.steps).png())
    print(text)


if __name__ == "__main__":
    main()
