"""What rounding will cost, forecast and measured: single sites by quadratic forms, whole plans by path attribution.

    python benchmarks/forecast.py --data cifar10 --weights resnet20_cifar10.pt [--plans 64] [--threads 1]
    python benchmarks/forecast.py --network squeezenext_cifar --weights squeezenext_cifar.pt
    python benchmarks/forecast.py --network vit_digits --weights vit-1.pt --parts single plans

A trained network, images of CIFAR-10 (or of scikit-learn's digits, for the vision transformer of
recipes/small_transformers), batches of 128. Judged by the KL divergence from the float network's outputs.

1. Single sites at 2, 3 and 4 bits, weights and activations: Omega / 2 and Q / 2, by all output columns and by drawn
   probes, against the KL when that site alone is quantized, on the same images.
2. Random plans of the weights with 2.5 and 3 bits on average (widths 2, 3, 4, 6, 8 drawn evenly, then single sites
   moved until the mean is met), against the KL on held-out images: right after quantizing, and with BatchNorm
   statistics measured again on the images that the forecast saw. Forecasts: Omega / 2; P with one point and with three;
   the mean shares on the way to 24 other random plans of that mean, on 128 images, in the place of those to uniform
   networks.
3. ``mixed``: the same with activations of 4 bits on average, drawn likewise.

Spearman's rank correlation, and the median of measured / forecast. Every part is kept in the results file as soon as it
is there, and not made again: delete the file to begin anew.

Results: benchmarks/results/forecast_NETWORK.{json,md}.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from forecast_tables import tables
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Subset

from hawq_lightning import Candidates, Problem, Site, SiteTable, candidates, measure, models, quantize, sites
from hawq_lightning.data import DigitsDataModule, ImageFolderDataModule
from hawq_lightning.quantization import (
    After,
    FloatDistance,
    Forecast,
    Mode,
    forecast,
    loss_per_site,
    rounding_errors,
    shares_of_plan,
    unquantize,
)
from hawq_lightning.quantization.post_training import reestimate_batchnorm
from hawq_lightning.selection import select

RESULTS = Path(__file__).resolve().parent / "results"
SINGLE, WIDTHS = (2, 3, 4), (2, 3, 4, 6, 8)
MEANS, ACTIVATION_MEAN, PATHS = (2.5, 3.0), 4.0, 24
NETWORKS = ("resnet20", "squeezenext_cifar", "mobilenet_cifar", "vit_digits")
BATCH, PARTS = 128, ("single", "plans", "mixed")
MODES: tuple[Mode, ...] = ("fast", "accurate")
Batches = list[Any]


def loss_fn(model: nn.Module, batch: Any) -> torch.Tensor:
    """The labelled loss."""
    return F.cross_entropy(model(batch[0]), batch[1])


def images_of(args: argparse.Namespace) -> tuple[nn.Module, Batches, Batches]:
    """The trained network, train images for forecasts, held-out images for measurements."""
    if args.network == "vit_digits":
        sys.path.append(str(Path(__file__).resolve().parents[1] / "recipes" / "small_transformers"))
        import nets

        data, net = DigitsDataModule(), nets.Grey()
        models.load_weights(net, args.weights)
    else:
        data = ImageFolderDataModule(args.data, num_classes=10, augment="none", memory=False)
        net = getattr(models, args.network)(weights=args.weights)
    data.setup("fit")

    def draw(dataset: Any) -> Batches:
        most = max(args.images, args.plan_images)
        order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0))[:most].tolist()
        return list(DataLoader(Subset(dataset, order), BATCH))

    return net.eval(), draw(data.train_dataloader().dataset), draw(data.val_dataloader().dataset)


def single_sites(net: nn.Module, batches: Batches, table: SiteTable) -> dict[str, Any]:
    """Part 1: a row a site and width."""
    widths = {"weight_bits": SINGLE, "activation_bits": SINGLE, "input_bits": None}
    rounding = rounding_errors(net, candidates(net, batches, None, table, loss_fn, **widths), table)
    took: dict[str, float] = {}
    weighed: dict[str, Candidates] = {}
    for name, settings in (("all columns", {"estimator": "exact"}), ("drawn probes", {})):
        began = time.process_time()
        traces = measure(net, batches, loss_fn, sites=table, rounding=rounding, progress=False, **settings)
        took[name] = time.process_time() - began
        weighed[name] = candidates(net, batches, traces, table, loss_fn, **widths)
    rows = loss_per_site(net, batches, FloatDistance(net, batches, loss_fn), table, weighed["all columns"])
    for row in rows:
        for name, listed in weighed.items():
            c = next(c for c in listed[str(row["site"])] if c.bits == row["bits"])
            row[f"omega, {name}"], row[f"q, {name}"], row[f"stderr, {name}"] = c.omega, c.q, c.q_stderr
    return {"rows": rows, "seconds": took}


def random_bits(of: Sequence[Site], mean: float, generator: torch.Generator) -> dict[str, int]:
    """Bits of sites whose mean over elements is ``mean``, within a twentieth of a bit."""
    total = sum(s.numel for s in of)
    steps = torch.randint(0, len(WIDTHS), (len(of),), generator=generator).tolist()
    while True:
        off = sum(WIDTHS[k] * s.numel for k, s in zip(steps, of)) / total - mean
        if abs(off) <= 0.05:
            return {s.name: WIDTHS[k] for s, k in zip(of, steps)}
        i = int(torch.randint(0, len(of), (1,), generator=generator))
        moved = steps[i] - (1 if off > 0 else -1)
        # a step that overshoots is taken now and then, so that no plan is a dead end
        change = (WIDTHS[moved] - WIDTHS[steps[i]]) * of[i].numel / total if 0 <= moved < len(WIDTHS) else 0.0
        if change and (abs(off + change) < abs(off) or float(torch.rand(1, generator=generator)) < 0.1):
            steps[i] = moved


def whole_plans(
    net: nn.Module, batches: Batches, held_out: Batches, table: SiteTable, part: dict[str, Any], plans: int,
    keep: Callable[[], None], mixed: bool = False,
) -> None:  # fmt: skip
    """Parts 2 and 3, into ``part``: forecasts first, then a row a plan."""
    widths = {"weight_bits": WIDTHS, "activation_bits": WIDTHS if mixed else None, "input_bits": None}
    weighed = candidates(net, batches, None, table, loss_fn, **widths)
    moved = SiteTable(tuple(s for s in table if s.name in weighed), table.layers)  # without the network's own input
    rows = part.setdefault("rows", [])
    generator = torch.Generator().manual_seed(1)
    drawn = []
    for mean in MEANS * plans:
        bits = random_bits(moved.weights, mean, generator)
        drawn.append((mean, bits | (random_bits(moved.activations, ACTIVATION_MEAN, generator) if mixed else {})))
    if len(rows) < len(drawn):
        traces = measure(net, batches, loss_fn, sites=table, progress=False)
        weighed = candidates(net, batches, traces, table, loss_fn, **widths)
        forecasts = uniform_forecasts(net, batches, table, weighed, part.setdefault("forecasts", {}))
        keep()
        measured_plans(net, batches, held_out, Problem(moved, weighed, traces), forecasts, drawn, rows, keep)
    of_paths = paths(net, batches[:1], table, weighed, part.setdefault("paths", {}), mixed)
    for row, (mean, bits) in zip(rows, drawn):
        for after, by_mean in of_paths.items():
            row[f"paths, after {after}"] = sum(nearest_share(by_mean[str(mean)][n], b) for n, b in bits.items())
    keep()


def stages_of(net: nn.Module) -> tuple[After, ...]:
    """Right after quantizing, and with BatchNorm measured again if there is one."""
    has_norm = any(isinstance(m, nn.BatchNorm2d) for m in net.modules())
    return ("quantizing", "batchnorm") if has_norm else ("quantizing",)


def uniform_forecasts(
    net: nn.Module, batches: Batches, table: SiteTable, weighed: Candidates, found: dict[str, Any]
) -> dict[str, Forecast]:
    """By paths to the uniform networks; what their check says goes into ``found``."""
    forecasts: dict[str, Forecast] = {}
    for after in stages_of(net):
        for mode in MODES:
            began, name = time.process_time(), f"{mode}, after {after}"
            made = forecasts[name] = forecast(net, batches, loss_fn, table, weighed, mode=mode, after=after)
            found[name] = {
                "seconds": time.process_time() - began, "forecast": dict(made.forecast_uniform),
                "measured": dict(made.measured_uniform),
            }  # fmt: skip
    return forecasts


def measured_plans(
    net: nn.Module, batches: Batches, held_out: Batches, problem: Problem, forecasts: Mapping[str, Forecast],
    drawn: Sequence[tuple[float, dict[str, int]]], rows: list[dict[str, Any]], keep: Callable[[], None],
) -> None:  # fmt: skip
    """A row for every plan that has none."""
    target = FloatDistance(net, held_out, loss_fn)
    float_state = {k: v.clone() for k, v in net.state_dict().items()}
    for mean, bits in drawn[len(rows) :]:
        plan = select(problem, None, "manual", bits=bits)
        row: dict[str, Any] = {"mean": mean, "omega": plan.omega / 2}
        row |= {name: made.of(bits) for name, made in forecasts.items()}
        quantize(net, plan)
        row["after quantizing"] = kl(net, held_out, target)
        if "batchnorm" in stages_of(net):
            reestimate_batchnorm(net, batches)
            net.eval()
            row["after batchnorm"] = kl(net, held_out, target)
        unquantize(net)
        net.load_state_dict(float_state)
        rows.append(row)
        if len(rows) % 8 == 0:
            keep()


def paths(
    net: nn.Module, batches: Batches, table: SiteTable, weighed: Candidates, known: dict[str, Any], mixed: bool
) -> dict[str, Any]:
    """Stage -> mean bits -> site -> bits -> mean share of the site over random plans that are not those judged."""
    for after in stages_of(net):
        for mean in MEANS:
            if str(mean) in known.setdefault(after, {}):
                continue
            generator = torch.Generator().manual_seed(7)
            found: dict[str, dict[str, list[float]]] = {}
            for _ in range(PATHS):
                bits = random_bits(table.weights, mean, generator)
                if mixed:
                    moved = [s for s in table.activations if s.name in weighed]
                    bits |= random_bits(moved, ACTIVATION_MEAN, generator)
                for name, share in shares_of_plan(net, batches, loss_fn, table, weighed, bits, after=after).items():
                    found.setdefault(name, {}).setdefault(str(bits[name]), []).append(share)
            known[after][str(mean)] = {n: {b: sum(v) / len(v) for b, v in of.items()} for n, of in found.items()}
    return known


def nearest_share(of_site: Mapping[str, float], bits: int) -> float:
    """That of the nearest width which some path had."""
    return of_site[min(of_site, key=lambda b: (abs(int(b) - bits), b))]


@torch.no_grad()
def kl(net: nn.Module, batches: Batches, target: FloatDistance) -> float:
    """Mean over images."""
    return sum(float(target(net, b)) * len(b[1]) for b in batches) / sum(len(b[1]) for b in batches)


def main() -> None:
    """Make what is missing of the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("/tmp/data/cifar10"), help="folder with train/ and val/")
    parser.add_argument("--network", choices=NETWORKS, default="resnet20")
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--plan-images", type=int, default=256, help="for the second part")
    parser.add_argument("--plans", type=int, default=64, help="of each mean")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / f"forecast_{args.network}.json"
    report: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    report |= {
        "date": time.strftime("%Y-%m-%d"), "images": args.images, "plan images": args.plan_images,
        "torch": torch.__version__, "network": args.network, "threads": args.threads,
    }  # fmt: skip

    def keep() -> None:
        part = file.with_suffix(".part")
        part.write_text(json.dumps(report) + "\n", encoding="utf-8")
        part.replace(file)
        file.with_suffix(".md").write_text(tables(json.loads(json.dumps(report))), encoding="utf-8")

    net, batches, held_out = images_of(args)
    table = sites(net, batches[0][0])
    if "single" in args.parts and "single" not in report:
        report["single"] = single_sites(net, batches[: -(-args.images // BATCH)], table)
        keep()
    few = slice(-(-args.plan_images // BATCH))
    for name in ("plans", "mixed"):
        if name in args.parts:
            part = report.setdefault(name, {})
            whole_plans(net, batches[few], held_out[few], table, part, args.plans, keep, mixed=name == "mixed")
    print(tables(json.loads(json.dumps(report))))


if __name__ == "__main__":
    main()
