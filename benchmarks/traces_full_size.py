"""Traces of the paper's networks at full size to 5% on every site: ours, and other packages in the same run.

    pip install pyhessian backpack-for-pytorch curvlinops-for-pytorch
    python benchmarks/traces_full_size.py --device cuda [--precision tf32] [--networks resnet50,inception_v3]
    python benchmarks/traces_full_size.py --networks resnet20 --images 16    # a rehearsal on a CPU

**Unmeasured: no GPU was at hand.** ResNet50 (54 weights, 54 activations; the paper: 30 minutes on 4 GPUs),
InceptionV3, SqueezeNext, and RetinaNet with ResNet50 at 800 px. Weights and images are random, as no others can be had
everywhere: what a probe costs does not depend on them; how many are needed does, and the table tells both. Every
method has a process of its own and one batch. Ours is the wall time of ``measure`` to 5% on the worst of all sites,
weights and activations. The others, which know weights alone, probe for ``--seconds``: with a probe's relative
deviation s at a layer and its time t they need ``(s / 0.05)^2 t``. Memory is beyond network and batch. What fails says
with what.
Results: benchmarks/results/traces_full_size{_cuda,...}.{json,md}, from where scaling.py takes ResNet50's probe.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from devices import Peak, add_device, machine, moved, now, prepare, suffixed
from torch import nn
from trace_cost import make
from traces import OTHERS, TARGET, Detector, only_weights, weights_of

RESULTS = Path(__file__).resolve().parent / "results"
# images a batch, height and width
NETWORKS = {
    "resnet50": (64, 224, 224), "inception_v3": (64, 299, 299), "squeezenext": (64, 224, 224),
    "retinanet_resnet50": (4, 800, 1067), "resnet20": (128, 32, 32),
}  # fmt: skip
METHODS = ("ours", "pyhessian", "curvlinops_hessian", "curvlinops_ggn", "curvlinops_mc", "backpack_mc")
OF_A_DETECTOR = ("ours", "pyhessian", "curvlinops_hessian")  # the others want one loss on one output


def ours(net: nn.Module, batch: Any, loss: Any, device: str) -> dict[str, Any]:
    from hawq_lightning import measure

    exclude = list(getattr(net, "quantization_exclude", ())) or None
    began = now(device, wall=True)
    found = measure(net.eval(), [batch], loss, exclude=exclude, rtol=TARGET, max_probes=1000, progress=False)
    seconds = now(device, wall=True) - began
    weights = sum(r.kind == "weight" for r in found)
    return {
        "seconds": seconds, "probes": found.settings["probes"], "estimator": found.settings["estimator"],
        "probe_seconds": seconds / max(1, found.settings["probes"]),
        "sites": {"weights": weights, "activations": len(found) - weights},
        "worst": max(r.stderr / max(r.trace, 1e-30) for r in found),
    }  # fmt: skip


def other(method: str, net: nn.Module, batch: Any, seconds: float, device: str) -> dict[str, Any]:
    x, y = batch
    plain = only_weights(Detector(net, y).train() if isinstance(x, list) else net.eval())
    began = now(device, wall=True)
    probe = OTHERS[method](plain, x, y)
    rows, times = [probe(0)], []
    setup = now(device, wall=True) - began
    began = now(device, wall=True)
    while len(rows) < 4 or now(device, wall=True) - began < seconds:
        start = now(device, wall=True)
        rows.append(probe(len(rows)))
        times.append(now(device, wall=True) - start)
    values = torch.tensor(rows, dtype=torch.float64)
    share = float((values.std(0) / values.mean(0).abs().clamp_min(1e-30)).max())
    one = statistics.median(times)
    return {
        "setup": setup, "probe_seconds": one, "probes": len(rows), "share": share,
        "sites": {"weights": len(weights_of(plain)), "activations": 0},
        "seconds": max(1.0, (share / TARGET) ** 2) * one, "extrapolated": (share / TARGET) ** 2 > len(rows),
    }  # fmt: skip


def work(method: str, name: str, args: argparse.Namespace) -> dict[str, Any]:
    forwards = prepare(args.device, args.precision)
    count, height, width = NETWORKS[name]
    net, batch, plain = make(name, (args.images or count, height, width))
    net, batch = net.to(args.device), moved(batch, args.device)

    def loss(m: nn.Module, b: Any) -> torch.Tensor:
        with forwards:
            return plain(m, b)

    peak = Peak(args.device)
    if method == "ours":
        found = ours(net, batch, loss, args.device)
    else:
        found = other(method, net, batch, args.seconds, args.device)
    return found | {"memory_mib": peak()}


def table(record: dict[str, Any]) -> str:
    lines = [
        "# Traces at full size to 5% on every site", "",
        f"`python benchmarks/traces_full_size.py --device {record['device']} --precision {record['precision']}`, "
        f"{record['date']}, {record['machine']}, torch {record['torch']}. Random weights and images.", "",
    ]  # fmt: skip
    for name, part in record["networks"].items():
        count, height, width = part["setting"]
        lines += [
            f"## {name}, {count} images of {height} x {width}", "",
            "| method | weights | activations | seconds | | a probe, s | over ours | memory, MiB |",
            "|---|---:|---:|---:|---|---:|---:|---:|",
        ]  # fmt: skip
        base = part["methods"].get("ours", {}).get("seconds")
        for method, r in part["methods"].items():
            if "error" in r:
                lines.append(f"| {method} | | | | failed: {r['error']} | | | |")
                continue
            over = f"{r['seconds'] / base:.3g}x" if base else ""
            how = "extrapolated" if r.get("extrapolated") else "measured"
            lines.append(
                f"| {method} | {r['sites']['weights']} | {r['sites']['activations']} | {r['seconds']:.3g} | {how} | "
                f"{r['probe_seconds']:.3g} | {over} | {r['memory_mib']:.0f} |"
            )
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", default="resnet50,inception_v3,squeezenext,retinanet_resnet50")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--images", type=int, help="a batch; by default 64, of RetinaNet 4")
    parser.add_argument("--seconds", type=float, default=20.0, help="of probes, each package and network")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    add_device(parser)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(work(args.one, args.networks, args)))
        return
    prepare(args.device)
    record: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"), "machine": machine(args.device), "device": args.device,
        "precision": args.precision, "torch": torch.__version__, "networks": {},
    }  # fmt: skip
    file = args.out / suffixed("traces_full_size", args.device, args.precision)
    for name in args.networks.split(","):
        count, *size = NETWORKS[name]
        part: dict[str, Any] = {"setting": [args.images or count, *size], "methods": {}}
        record["networks"][name] = part
        for method in args.methods.split(","):
            if name.startswith("retinanet") and method not in OF_A_DETECTOR:
                continue
            command = [sys.executable, __file__, "--one", method, "--networks", name, "--seconds", str(args.seconds)]
            command += ["--device", args.device, "--precision", args.precision]
            command += ["--images", str(args.images)] if args.images else []
            done = subprocess.run(command, capture_output=True, text=True, env={"OMP_NUM_THREADS": "1", **os.environ})
            last = (done.stderr if done.returncode else done.stdout).strip().splitlines()[-1:]
            if done.returncode:
                part["methods"][method] = {"error": (last or [f"exit {done.returncode}"])[0][:200].replace("|", "/")}
            else:
                part["methods"][method] = json.loads(last[0])
            print(name, method, part["methods"][method], flush=True)
            args.out.mkdir(exist_ok=True)
            file.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
            file.with_suffix(".md").write_text(table(record))
    print(table(record))


if __name__ == "__main__":
    main()
