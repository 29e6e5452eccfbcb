"""The time of the search, HAQ's agent against HAWQ-V2, on ResNet50 (the paper's Table 4 in kind).

    python benchmarks/search_time.py [--images 16] [--size 96] [--trials 4]

ResNet50 with random weights on random images: times, no accuracies. One thread. HAWQ-V2 is measured whole: traces,
candidates, choice of bits. HAQ is what its authors' code does by default: 600 episodes, in each of which the quantized
network is trained for an epoch of 20,000 images and judged on 10,000. A training step and a forward pass of the
fake-quantized network are measured, and the agent's own time by ``--trials`` episodes of our selector ``haq``; all is
multiplied up, and marked so. Between the two: our selector with 600 episodes, whose reward is the loss of the plan on
the images that the traces were measured on, without training.

Results: benchmarks/results/search_time.json, docs/results/table4.md.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

import hawq_lightning as hl
from hawq_lightning.models import resnet50
from hawq_lightning.quantization import loss_of_plan

ROOT = Path(__file__).resolve().parents[1]
RESULTS, PAGE = ROOT / "benchmarks" / "results" / "search_time.json", ROOT / "docs" / "results" / "table4.md"
WIDTHS, BUDGET = (2, 3, 4, 6, 8), "10.57x"
EPISODES, TRAINED, JUDGED = 600, 20_000, 10_000  # of HAQ's code


def loss_fn(model: nn.Module, batch: Any) -> torch.Tensor:
    """Of labelled images."""
    return F.cross_entropy(model(batch[0]), batch[1])


def measured(args: argparse.Namespace) -> dict[str, Any]:
    """CPU seconds of all parts."""
    torch.manual_seed(0)
    net = resnet50().eval()
    batch = torch.randn(args.images, 3, args.size, args.size), torch.randint(1000, (args.images,))
    out: dict[str, Any] = {
        "images": args.images, "size": args.size, "trials": args.trials, "rtol": args.rtol, "torch": torch.__version__,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores", "date": time.strftime("%Y-%m-%d"),
    }  # fmt: skip
    began = time.process_time()
    table = hl.sites(net, batch[0][:2])
    traces = hl.measure(net, [batch], loss_fn, sites=table, rtol=args.rtol, progress=False)
    out["traces"] = time.process_time() - began
    out |= {"probes": traces.settings["probes"], "sites": len(table)}
    weighed = hl.candidates(net, [batch], traces, table, loss_fn, weight_bits=WIDTHS, activation_bits=8)
    problem = hl.Problem(table, weighed, traces)
    plan = hl.select(problem, BUDGET)
    out["hawq_v2"] = time.process_time() - began
    with loss_of_plan(net, [batch], loss_fn) as loss:
        loss(plan)
        spent = 0.0

        def timed(one: hl.Plan) -> float:
            nonlocal spent
            start = time.process_time()
            found = loss(one)
            spent += time.process_time() - start
            return found

        began = time.process_time()
        hl.select(problem, BUDGET, "haq", measure_loss=timed, trials=args.trials)
        out["episode"] = (time.process_time() - began) / args.trials
        out["agent"] = (time.process_time() - began - spent) / args.trials
    hl.quantize(net, plan)
    began = time.process_time()
    with torch.no_grad():
        net(batch[0])
    out["judged_image"] = (time.process_time() - began) / args.images
    net.train()
    optimizer = torch.optim.SGD(net.parameters(), 1e-3)
    began = time.process_time()
    loss_fn(net, batch).backward()
    optimizer.step()
    out["trained_image"] = (time.process_time() - began) / args.images
    out["haq_here"] = EPISODES * out["episode"]
    out["haq"] = EPISODES * (TRAINED * out["trained_image"] + JUDGED * out["judged_image"] + out["agent"])
    return out


def text(r: dict[str, Any]) -> str:
    """The page."""
    rows = [
        ("HAWQ-V2: traces, candidates, choice", "measured", r["hawq_v2"]),
        (f"HAQ's agent, {EPISODES} episodes, reward by loss on the same images", "extrapolated", r["haq_here"]),
        (f"HAQ's agent, {EPISODES} episodes, reward after an epoch (its authors' code)", "extrapolated", r["haq"]),
    ]
    lines = [
        "# Table 4: the time of the search", "",
        "**The paper**: HAWQ-V2 is up to 120 times faster than HAQ; the traces of ResNet50's 54 blocks take 30 minutes "
        "on 4 GPUs.", "",
        f"**Here**: on the same machine and images HAWQ-V2 needs {r['hawq_v2']:.0f} CPU seconds; HAQ would need "
        f"{r['haq_here'] / r['hawq_v2']:,.0f} times that if it only measured losses, {r['haq'] / r['hawq_v2']:,.0f} "
        "times with the training of its authors' code. The last ratio depends on the images of both: HAQ's are 30,000 "
        f"an episode, the traces' {r['images']} here; with 512 images the traces would take about "
        f"{512 / r['images']:.0f} times as long, HAQ {r['haq'] / r['hawq_v2'] * r['images'] / 512:,.0f} times that.",
        "", "| search | how | CPU seconds | x HAWQ-V2 |", "|---|---|---:|---:|",
        *(f"| {name} | {how} | {s:,.0f} | {s / r['hawq_v2']:,.1f} |" for name, how, s in rows), "",
        f"ResNet50, random weights, {r['images']} random images of {r['size']} pixels, widths {WIDTHS}, {BUDGET}, "
        f"activations at 8 bits; {r['sites']} sites, {r['probes']} probes an image to {r['rtol']:.0%} standard error. "
        f"Measured: {r['trials']} episodes of {r['episode']:.1f} s ({r['agent']:.2f} s of them the agent), "
        f"{r['judged_image']:.3f} s an image judged and {r['trained_image']:.3f} s an image trained, fake-quantized. "
        f"HAQ's defaults ({EPISODES} episodes, {TRAINED:,} images trained and {JUDGED:,} judged in each) are those of "
        "the code that its authors published. Accuracies are not compared: nothing is trained here. On a small trained "
        "network: [searches at equal trials](paper.md#searches-at-equal-trials).", "",
        "```", f"python benchmarks/search_time.py --images {r['images']} --size {r['size']} --trials {r['trials']}",
        "```", "", f"{r['date']}, {r['machine']}, torch {r['torch']}, one thread.",
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--size", type=int, default=96)
    parser.add_argument("--trials", type=int, default=4)
    parser.add_argument("--rtol", type=float, default=0.05)
    args = parser.parse_args()
    torch.set_num_threads(1)
    found = measured(args)
    RESULTS.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    PAGE.write_text(text(found), encoding="utf-8")
    print(text(found))


if __name__ == "__main__":
    main()
