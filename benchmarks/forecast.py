"""What rounding will cost, forecast and measured: single sites by quadratic forms, whole plans by path attribution.

    python benchmarks/forecast.py --data cifar10 --weights resnet20_cifar10.pt [--plans 128] [--threads 1]
    python benchmarks/forecast.py --network squeezenext_cifar --weights squeezenext_cifar.pt
    python benchmarks/forecast.py --network vit_digits --weights vit-1.pt --parts single plans

A trained network, images of CIFAR-10 (or of scikit-learn's digits, for the vision transformer of
recipes/small_transformers), batches of 128. Judged by the KL divergence from the float network's outputs.

1. Single sites at 2, 3 and 4 bits, weights and activations: Omega / 2 and Q / 2, by all output columns and by drawn
   probes, against the KL when that site alone is quantized, on the same images.
2. ``again``: the same of weights whose layer has a BatchNorm of its own, with all BatchNorm statistics measured again
   on the images after each is quantized, against the float network's so measured: QB / 2, Q / 2 and Omega / 2 by drawn
   probes.
3. ``plans``: random plans of the weights with 2.5 and 3 bits on average (widths 2, 3, 4, 6, 8 drawn evenly, then
   single sites moved until the mean is met), against the KL on held-out images: right after quantizing, and with
   BatchNorm statistics measured again on training images. Forecasts: Omega / 2, from the training images; P with one
   point and with three, from as many other held-out images, as a run takes them (a network is surer of the images that
   it was trained on, which makes divergences smaller there); the mean shares on the way to 24 other random plans of
   that mean, on 128 of these, in the place of those to uniform networks.
4. ``mixed``: the same with activations of 4 bits on average, drawn likewise.
5. ``four``: plans as in 3, of 4 bits on average: networks that still work, where those of part 3 are near chance.

Spearman's rank correlation, and the median of measured / forecast. Every part is kept in the results file as soon as it
is there, and not made again: delete the file to begin anew, or "forecasts" of a part to forecast its plans again.

Results: benchmarks/results/forecast_NETWORK.{json,md}.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from forecast_single import again, single_sites
from forecast_subjects import BATCH, NETWORKS, Batches, images_of, kl, loss_fn
from forecast_tables import tables
from torch import nn

from hawq_lightning import Candidates, Problem, Site, SiteTable, candidates, measure, quantize, sites
from hawq_lightning.quantization import (
    After,
    FloatDistance,
    Forecast,
    Mode,
    forecast,
    shares_of_plan,
    unquantize,
)
from hawq_lightning.quantization.post_training import reestimate_batchnorm
from hawq_lightning.selection import select

RESULTS = Path(__file__).resolve().parent / "results"
WIDTHS = (2, 3, 4, 6, 8)
MEANS, FOUR, ACTIVATION_MEAN, PATHS = (2.5, 3.0), (4.0,), 4.0, 24
PARTS = ("single", "again", "plans", "mixed", "four")
MODES: tuple[Mode, ...] = ("fast", "accurate")


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
    net: nn.Module, batches: Batches, ahead: Batches, held_out: Batches, table: SiteTable, part: dict[str, Any],
    plans: int, keep: Callable[[], None],
    mixed: bool = False, means: Sequence[float] = MEANS, random_paths: bool = True,
) -> None:  # fmt: skip
    """Parts 3 to 5, into ``part``: forecasts, from the images ``ahead``, then a row a plan."""
    widths = {"weight_bits": WIDTHS, "activation_bits": WIDTHS if mixed else None, "input_bits": None}
    weighed = candidates(net, batches, None, table, loss_fn, **widths)
    moved = SiteTable(tuple(s for s in table if s.name in weighed), table.layers)  # without the network's own input
    rows = part.setdefault("rows", [])
    generator = torch.Generator().manual_seed(1)
    drawn = []
    for mean in [*means] * plans:
        bits = random_bits(moved.weights, mean, generator)
        drawn.append((mean, bits | (random_bits(moved.activations, ACTIVATION_MEAN, generator) if mixed else {})))
    if len(rows) < len(drawn) or "forecasts" not in part:
        forecasts = uniform_forecasts(net, ahead, batches, table, weighed, part.setdefault("forecasts", {}))
        for row, (_, bits) in zip(rows, drawn):
            row |= {name: made.of(bits) for name, made in forecasts.items()}
        keep()
    if len(rows) < len(drawn):
        traces = measure(net, batches, loss_fn, sites=table, progress=False)
        weighed = candidates(net, batches, traces, table, loss_fn, **widths)
        measured_plans(net, batches, held_out, Problem(moved, weighed, traces), forecasts, drawn, rows, keep)
    if not random_paths:
        return
    of_paths = paths(net, ahead[:1], table, weighed, part.setdefault("paths", {}), means, mixed)
    for row, (mean, bits) in zip(rows, drawn):
        for after, by_mean in of_paths.items():
            row[f"paths, after {after}"] = sum(nearest_share(by_mean[str(mean)][n], b) for n, b in bits.items())
    keep()


def stages_of(net: nn.Module) -> tuple[After, ...]:
    """Right after quantizing, and with BatchNorm measured again if there is one."""
    has_norm = any(isinstance(m, nn.BatchNorm2d) for m in net.modules())
    return ("quantizing", "batchnorm") if has_norm else ("quantizing",)


def uniform_forecasts(
    net: nn.Module, ahead: Batches, batches: Batches, table: SiteTable, weighed: Candidates, found: dict[str, Any]
) -> dict[str, Forecast]:
    """By paths to the uniform networks; what their check says goes into ``found``."""
    forecasts: dict[str, Forecast] = {}
    for after in stages_of(net):
        for mode in MODES:
            began, name = time.process_time(), f"{mode}, after {after}"
            made = forecasts[name] = forecast(
                net, ahead, loss_fn, table, weighed, mode=mode, after=after, statistics=batches
            )
            found[name] = {
                "seconds": time.process_time() - began, "forecast": dict(made.forecast_uniform),
                "measured": dict(made.measured_uniform), "start": made.start, "tangent": made.tangent is not None,
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
    net: nn.Module, batches: Batches, table: SiteTable, weighed: Candidates, known: dict[str, Any],
    means: Sequence[float], mixed: bool,
) -> dict[str, Any]:  # fmt: skip
    """Stage -> mean bits -> site -> bits -> mean share of the site over random plans that are not those judged."""
    for after in stages_of(net):
        for mean in means:
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


def main() -> None:
    """Make what is missing of the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("/tmp/data/cifar10"), help="folder with train/ and val/")
    parser.add_argument("--network", choices=NETWORKS, default="resnet20")
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--plan-images", type=int, default=256, help="for whole plans")
    parser.add_argument("--plans", type=int, default=128, help="of each mean")
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
    if "again" in args.parts and "again" not in report and "batchnorm" in stages_of(net):
        report["again"] = again(net, batches[: -(-args.images // BATCH)], table)
        keep()
    few = -(-args.plan_images // BATCH)
    for name in ("plans", "mixed", "four"):
        if name in args.parts:
            part = report.setdefault(name, {})
            ahead = held_out[few : 2 * few]
            how = {"means": FOUR, "random_paths": False} if name == "four" else {"mixed": name == "mixed"}
            whole_plans(net, batches[:few], ahead, held_out[:few], table, part, args.plans, keep, **how)
    print(tables(json.loads(json.dumps(report))))


if __name__ == "__main__":
    main()
