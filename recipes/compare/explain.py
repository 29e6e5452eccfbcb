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
import json
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from design import ExperimentDesign
from explain_page import draw, tables
from held_out import HeldOut
from jobs import needs

from hawq_lightning import HawqError, Plan, select
from hawq_lightning.report import write_text
from hawq_lightning.selection import problem_of

MARKS = (0, 5, 10, 20, 40, 80, 160)


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


def explain(design: ExperimentDesign, settings: Sequence[str], asked: argparse.Namespace) -> str:
    """Measure what is not yet in ``explain.json``, and write the page and the picture."""
    record, labels = Record(design.out / "explain.json"), {s: design.asked["settings"][s]["label"] for s in settings}
    reference = design.asked["reference"]
    for setting in settings:
        held_out = HeldOut(design, setting, asked.images)
        base = design.asked["settings"][setting].get("options_of", setting)
        problem = problem_of(Plan.load(design.plan(base, reference, 1).file))
        alone = record.once(f"{base}/alone", partial(held_out.one_by_one, problem))
        plans, eigenvalues = known_plans(design, setting)
        budget = plans[reference].budget
        for i in range(asked.plans):
            plans[f"random {i + 1}"] = select(problem, budget, "random", seed=100 + i)
        for name, plan in plans.items():
            row = record.once(f"{setting}/plan/{name}", partial(held_out.stages, plan, asked.lr, asked.steps))
            row["said"] = predictions(plan, eigenvalues, alone)
        for seed in range(2, 2 + asked.seeds):
            again = partial(held_out.fine_tune, plans[reference], asked.lr, asked.steps, seed)
            record.once(f"{setting}/seed/{seed}", again)
        for method in filter(None, asked.curve.split(",")):
            whole = partial(held_out.fine_tune, plans[method], asked.lr, asked.whole, 1, MARKS)
            record.once(f"{setting}/curve/{method}", whole)
    text = "\n".join(tables(record.found, labels, asked.steps)) + "\n"
    write_text(record.path, json.dumps(record.found, indent=1))
    write_text(design.out / "explain.md", text)
    (design.out / "explain.png").write_bytes(draw(record.found, labels, asked.steps).png())
    return text


def known_plans(design: ExperimentDesign, setting: str) -> tuple[dict[str, Plan], Mapping[str, float]]:
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
        design = ExperimentDesign(asked.design, asked.out, dict(g.split("=", 1) for g in asked.given))
        print(explain(design, asked.settings.split(","), asked))
    except HawqError as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
