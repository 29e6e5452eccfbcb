"""What a back-propagated image costs: a Gauss-Newton probe against a training step, on the paper's and other networks.

    pip install 'hawq-lightning[vision,detection]' timm transformers
    python benchmarks/trace_cost.py [--models resnet50 ...] [--repeat 5] [--no-double]
    python benchmarks/trace_cost.py --device cuda --precision tf32    # never run yet

Random weights, random images of the usual size, one batch. A *training step* is forward and backward in training mode
with all gradients, without the optimizer. A *probe* is one pass of :func:`hawq_lightning.measure`'s loop: a forward
pass with the hooks in place, the factor of the loss's Hessian, and one backward pass that yields every weight's and
every activation's squared norm for every image. Where the loss is slightly concave in places (focal), every eighth
probe sends that part back as well: its time goes in by an eighth. Both run in processes of their own, in turns (step,
probe, step, ...); a ratio is the median of the turns' ratios. Memory is the peak resident set beyond what model and
imports hold. *With forms* is a probe that also gives the quadratic form of the rounding error of five widths at every
weight and activation, of 8 bits alone at the network's input (``measure(..., rounding=)``), against the probe without.
*Forecast* is :func:`hawq_lightning.forecast` of four batches by three points of the path to five uniform networks, a
sixtieth of its time against a step (what it does once whatever the data, such as rounding the weights, is in it). For
ViT-S and BERT-base a probe of the true Hessian by double backward is timed as well, and told apart.

Results: benchmarks/results/trace_cost.{json,md}, with device and precision in the name where they are others.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from devices import Peak, add_device, machine, moved, now, prepare, suffixed
from torch import nn
from torch.nn import functional as F

from hawq_lightning import models

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
# images a batch, height and width
SETTINGS = {
    "resnet50": (8, 224, 224), "inception_v3": (8, 299, 299), "squeezenext": (8, 224, 224),
    "retinanet_resnet50": (2, 480, 640), "vit_small": (4, 224, 224), "bert_base": (4, 1, 128),
    "resnet20": (128, 32, 32),
}  # fmt: skip
WIDTHS, POINTS = (2, 3, 4, 6, 8), 3  # whose quadratic forms and forecasts are timed; points of the path
FORECAST_BATCHES = 4  # a run has at least so many: 512 images
DOUBLE = ("vit_small", "bert_base")
PAPER_IMAGES, PAPER_MINUTES, PAPER_GPUS = 512, 30, 4  # ResNet50, all layers (section 3.1)


def make(
    name: str, setting: tuple[int, int, int] | None = None
) -> tuple[nn.Module, Any, Callable[[nn.Module, Any], torch.Tensor]]:
    """A network, a batch, and its loss; ``setting``: images a batch, height and width."""
    torch.manual_seed(0)
    count, height, width = setting or SETTINGS[name]
    if name.startswith("retinanet"):
        net = models.retinanet_resnet50(num_classes=80, min_size=height, max_size=width)
        images = [torch.rand(3, height, width) for _ in range(count)]
        targets = []
        for _ in range(count):
            corner = torch.rand(7, 2) * torch.tensor([width * 0.6, height * 0.6])
            size = 20 + torch.rand(7, 2) * torch.tensor([width * 0.3, height * 0.3])
            targets.append({"boxes": torch.cat([corner, corner + size], 1), "labels": torch.randint(0, 80, (7,))})
        return net, (images, targets), lambda m, b: torch.stack(list(m(*b).values())).sum()
    labels = torch.randint(0, 10 if name == "resnet20" else 1000, (count,))
    if name == "bert_base":
        import transformers

        config = transformers.BertConfig(num_labels=1000)
        net = transformers.BertForSequenceClassification(config)
        tokens = torch.randint(0, config.vocab_size, (count, width))
        return net, (tokens, labels), lambda m, b: F.cross_entropy(m(b[0]).logits, b[1])
    if name == "vit_small":
        import timm

        net = timm.create_model("vit_small_patch16_224")
    else:
        net = getattr(models, name)()
    batch = (torch.randn(count, 3, height, width), labels)

    def loss(m: nn.Module, b: Any) -> torch.Tensor:
        out = m(b[0])
        if isinstance(out, tuple):  # Inception's auxiliary head
            return F.cross_entropy(out[0], b[1]) + 0.4 * F.cross_entropy(out[1], b[1])
        return F.cross_entropy(out, b[1])

    return net, batch, loss


def work(name: str, what: str, threads: int, device: str, precision: str, wall: bool) -> None:
    """Answer every line on stdin with the seconds of one step; then the peak memory."""
    torch.set_num_threads(threads)
    forwards = prepare(device, precision)
    net, batch, plain = make(name)
    net, batch = net.to(device), moved(batch, device)
    net.train()
    count = SETTINGS[name][0]
    peak, pages = Peak(device), contextlib.nullcontext()

    def loss(m: nn.Module, b: Any) -> torch.Tensor:
        with forwards:
            return plain(m, b)

    if what == "step":
        thin = 1

        def run(concave: float) -> None:
            loss(net, batch).backward()
            net.zero_grad(set_to_none=True)
    elif what == "forecast":
        from hawq_lightning import candidates, forecast, sites

        thin = 1
        exclude = list(getattr(net, "quantization_exclude", ()))
        table = sites(net, batch, forward=loss, exclude=exclude)
        weighed = candidates(net, [batch], None, table, loss, weight_bits=WIDTHS, activation_bits=WIDTHS)

        batches = [tuple(t.roll(i, 0) for t in batch) for i in range(FORECAST_BATCHES)]

        def run(concave: float) -> None:
            forecast(net, batches, loss, table, weighed, mode="accurate")
    else:
        from hawq_lightning.quantization import candidates, quantizable_layers, rounding_errors
        from hawq_lightning.sensitivity import (
            GaussNewton,
            Heap,
            Hutchinson,
            MeasureContext,
            ProbeRequest,
            ProcessShard,
            batch_images,
            find_sites,
            isolated_eval,
            pages_kept,
            release_memory,
            samples_apart,
        )

        exclude = list(getattr(net, "quantization_exclude", ()))
        with isolated_eval(net, 0):
            layers, _ = quantizable_layers(net, None, exclude)
            table = find_sites(net, lambda: loss(net, batch), count, None, exclude)
            context = MeasureContext(net, {x.name: layers[x.name] for x in table.layers}, table, loss)
            per_sample = samples_apart(context, batch, count, batch_images)
            kind = Hutchinson() if what == "double" else GaussNewton()
            estimator = kind.calibrate(context, [batch], ProcessShard(), 1000)
            thin = estimator.period
            if what == "forms":
                weighed = candidates(net, [batch], None, table, loss, weight_bits=WIDTHS, activation_bits=WIDTHS)
                context = dataclasses.replace(context, rounding=rounding_errors(net, weighed, table))
            release_memory()
        pages = pages_kept()  # as around the loop
        seed, heap = 0, Heap()

        def run(concave: float) -> None:
            nonlocal seed
            seed += 1
            # probe 0 of a period holds the concave part, probe 1 does not
            first = 0 if concave else 1
            request = ProbeRequest(batch, count, per_sample, [(count, seed)], 1, first_probe=first, batch_number=0)
            with isolated_eval(net, 0):
                estimator.probe(context, request)
            heap.tidy()  # as the loop does after every batch

    print(thin, flush=True)
    with pages:
        for line in sys.stdin:
            began = now(device, wall)
            run(float(line))
            print(now(device, wall) - began, peak(), flush=True)


def compare(name: str, args: argparse.Namespace, doubled: bool) -> dict[str, Any]:
    # a detector's lists of boxes have no distance that is the same for all images
    ahead = [] if name.startswith("retinanet") else ["forecast"]
    where = ["--threads", str(args.threads), "--device", args.device, "--precision", args.precision]
    where += ["--cpu-time"] if args.cpu_time else []
    processes = {
        what: subprocess.Popen(
            [sys.executable, __file__, "--worker", name, what, *where],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for what in ("step", "probe", "forms", *ahead, *(["double"] if doubled else []))
    }
    thin = {what: int(_answer(process)) for what, process in processes.items()}["probe"]
    kinds = {
        what: (what, 1.0 if thin == 1 or what in ("step", "forecast") else 0.0)
        for what in ("step", "probe", "forms", *ahead)
    }
    if thin > 1:
        kinds["probe with the concave part"] = ("probe", float(thin))
    seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
    if doubled:
        kinds["double backward"] = ("double", 1.0)
        seconds["double backward"] = []
    memory = dict.fromkeys(processes, 0.0)
    for turn in range(args.repeat + 1):
        for kind, (what, concave) in kinds.items():
            took, peak = map(float, _answer(processes[what], f"{concave}\n").split())
            memory[what] = peak
            if turn:  # the first warms up
                seconds[kind].append(took)
    for process in processes.values():
        assert process.stdin is not None
        process.stdin.close()
        process.wait()
    count = SETTINGS[name][0]
    with_concave = seconds.get("probe with the concave part", seconds["probe"])
    mixed = [(p * (thin - 1) + c) / thin for p, c in zip(seconds["probe"], with_concave, strict=True)]
    more: dict[str, Any] = {}
    if doubled:
        times = ratio(seconds["double backward"], seconds["step"])
        more["double_backward"] = {"time_ratio": times, "memory_ratio": memory["double"] / memory["step"]}
    if ahead:
        passes = FORECAST_BATCHES * len(WIDTHS) * POINTS
        more["forecast_time_ratio"] = ratio(seconds["forecast"], seconds["step"]) / passes
    return more | {
        "batch": SETTINGS[name],
        "seconds_an_image": {
            "step": statistics.median(seconds["step"]) / count, "probe": statistics.median(mixed) / count,
        },
        "every": thin, "all_seconds": seconds, "memory_mib": memory,
        "time_ratio": ratio(mixed, seconds["step"]), "memory_ratio": memory["probe"] / memory["step"],
        "forms_time_ratio": ratio(seconds["forms"], seconds["probe"]),
        "forms_memory_ratio": memory["forms"] / memory["probe"],
    }  # fmt: skip


def ratio(of: list[float], to: list[float]) -> float:
    """Median over the turns: a machine's speed swings by a third within minutes, and less within a turn."""
    return statistics.median(a / b for a, b in zip(of, to, strict=True))


def _answer(process: subprocess.Popen[str], line: str = "") -> str:
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(line)
    process.stdin.flush()
    return process.stdout.readline()


def table(report: dict[str, Any]) -> str:
    lines = [
        "# A probe against a training step", "",
        f"{report['date']}, {report['machine']}, torch {report['torch']}, {report['threads']} threads, load "
        f"{report['load']:.1f} before. Made by `benchmarks/trace_cost.py`, whose head says "
        "how.", "",
        "| network | batch | step, s an image | probe, s | time ratio | step, MiB | probe, MiB | memory ratio | by |",
        "|---|---|---:|---:|---:|---:|---:|---:|---|",
    ]  # fmt: skip
    for name, r in report["models"].items():
        count, height, width = r["batch"]
        s, m = r["seconds_an_image"], r["memory_mib"]
        lines.append(
            f"| {name} | {count} x {height} x {width} | {s['step']:.3f} | {s['probe']:.3f} | {r['time_ratio']:.2f} | "
            f"{m['step']:.0f} | {m['probe']:.0f} | {r['memory_ratio']:.2f} | "
            f"{'CPU' if r.get('cpu time') else 'wall'} |"
        )
    lines += [
        "",
        f"With quadratic forms of {len(WIDTHS)} widths at every weight and activation, against a probe without:",
        "",
        "| network | time ratio | memory ratio | a width and point of the forecast, training steps |",
        "|---|---:|---:|---:|",
    ]
    for name, r in report["models"].items():
        if "forms_time_ratio" in r:
            by = "" if r.get("forecast batches") else " (one batch)"
            ahead = f"{r['forecast_time_ratio']:.2f}{by}" if "forecast_time_ratio" in r else ""
            lines.append(f"| {name} | {r['forms_time_ratio']:.2f} | {r['forms_memory_ratio']:.2f} | {ahead} |")
    for name, r in report["models"].items():
        if "double_backward" in r:
            double = r["double_backward"]
            lines += [
                "",
                f"{name}: a probe of the true Hessian by double backward takes {double['time_ratio']:.2f} times a "
                f"step, and {double['memory_ratio']:.2f} times its memory.",
            ]
    if "resnet50" in report["models"]:
        ratio = report["models"]["resnet50"]["time_ratio"]
        lines += [
            "",
            f"The paper needs {PAPER_MINUTES} minutes on {PAPER_GPUS} GPUs for ResNet50's traces (section 3.1). By the "
            f"ratio above a probe of one image costs {ratio:.2f} training steps of it; a V100 trains ResNet50 at some "
            "360 images a second in float32 (not measured here), so that one probe for each of "
            f"{PAPER_IMAGES} images would take about {PAPER_IMAGES / 360 * ratio:.1f} s on one of them, and twenty "
            f"{20 * PAPER_IMAGES / 360 * ratio:.0f} s: an extrapolation, to be confirmed on a GPU.",
        ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(SETTINGS), choices=list(SETTINGS))
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--cpu-time", action="store_true", help="of the process in the place of the wall's")
    parser.add_argument("--no-double", action="store_true", help="without double backward, which takes minutes a probe")
    add_device(parser)
    parser.add_argument("--worker", nargs=2, metavar=("MODEL", "WHAT"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        name, what = args.worker
        work(name, what, args.threads, args.device, args.precision, not args.cpu_time)
        return
    prepare(args.device)
    file = args.out / f"{suffixed('trace_cost', args.device, args.precision)}.json"
    known = json.loads(file.read_text(encoding="utf-8"))["models"] if file.is_file() else {}
    report: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"), "machine": f"{machine(args.device)}, {os.cpu_count()} cores",
        "torch": torch.__version__, "threads": args.threads, "load": os.getloadavg()[0],
        "models": known,
    }  # fmt: skip
    for name in args.models:
        doubled = name in DOUBLE and not args.no_double
        how = {"date": report["date"], "cpu time": args.cpu_time, "forecast batches": FORECAST_BATCHES}
        report["models"][name] = compare(name, args, doubled) | how
        print(name, {k: report["models"][name][k] for k in ("time_ratio", "memory_ratio")}, flush=True)
        args.out.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        file.with_suffix(".md").write_text(table(report), encoding="utf-8")
    print(table(report))


if __name__ == "__main__":
    main()
