"""Time and peak memory of a W4A4 training step over the float step: ours and other packages', same network.

    pip install brevitas
    python benchmarks/training_step.py [--networks resnet20,resnet18] [--rounds 3] [--steps 4]
    python benchmarks/training_step.py --device cuda --precision bf16    # or tf32; unmeasured: no GPU was at hand

A step is forward, loss, backward and SGD with momentum on random images: ResNet20 on 128 images of 32 x 32,
torchvision's ResNet18 on 16 of 224 x 224, on a GPU its ResNet50 on 64 of 224 x 224, and there the fused kernel and
torch.compile as well. Weights of all convolutions and the linear layer have 4 bits with one scale a
channel, what they read has 4 bits with one scale a tensor. (torchao's training layers are linear only.)

Every measurement is a process of its own, on one thread; methods take turns, so that other load meets all of them.
Seconds are of the processor, the least of a process's steps (after one to warm up); of the rounds the median is shown,
with the range. Memory is the peak resident set of the steps beyond what model, data and imports hold. Packages that are
absent are left out. On a GPU seconds are of the wall, once it has nothing left to do, and memory is its allocator's.
Results: benchmarks/results/training_step.{json,md}, with device and precision in the name where they are others.
"""

from __future__ import annotations

import argparse
import gc
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
from devices import Peak, add_device, machine, now, prepare, suffixed
from torch import nn
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
NETWORKS = {"resnet20": (128, 32, 10), "resnet18": (16, 224, 1000), "resnet50": (64, 224, 1000)}
METHODS = {
    "float": "float",
    "uniform": "ours, uniform",
    "lsq": "ours, LSQ",
    "brevitas": "Brevitas",
    "brevitas_lsq": "Brevitas, learned scales",
    "torch_fx": "torch.ao fake-quant modules",
}
ON_A_GPU = {
    "uniform_triton": "ours, uniform, fused kernel",
    "float_compiled": "float, torch.compile",
    "uniform_compiled": "ours, uniform, torch.compile",
}


def network(name: str) -> nn.Module:
    torch.manual_seed(0)
    if name == "resnet20":
        from hawq_lightning.models import resnet20

        return resnet20()
    import torchvision

    return getattr(torchvision.models, name)()  # type: ignore[no-any-return]


def ours(net: nn.Module, images: torch.Tensor, quantizer: str) -> nn.Module:
    """Steps fitted to the weights; activation steps from one pass, as a plan would have them."""
    from hawq_lightning import Plan, PlanSite
    from hawq_lightning.quantization import activation_step, quantizable_layers, quantize

    layers, _ = quantizable_layers(net)
    sites: list[PlanSite] = []
    reads: dict[str, torch.Tensor] = {}
    handles = [
        layer.on_call(lambda x, y, name=n: reads.update({name: x.detach()}))  # type: ignore[misc]
        for n, layer in layers.items()
    ]
    with torch.no_grad():
        net(images)
    for handle in handles:
        handle.remove()
    for name, layer in layers.items():
        shape = tuple(layer.weight.shape)
        sites.append(PlanSite(f"{name}.weight", "weight", (name,), shape, layer.weight.numel(), 4, "affine"))
    for name, x in reads.items():
        step, zero = activation_step(x.flatten()[:20_000], float(x.min()), float(x.max()), 4)
        sites.append(PlanSite(f"{name}.input", "activation", (name,), (), 0, 4, "affine", step, zero))
    return quantize(net, Plan(sites=tuple(sites), quantizer=quantizer))


def brevitas(net: nn.Module, images: torch.Tensor, learned: bool) -> nn.Module:
    import brevitas.nn as qnn
    from brevitas.quant import Int8ActPerTensorFloat, Int8WeightPerChannelFloat, Uint8ActPerTensorFloat

    def quantizers(first: bool) -> dict[str, Any]:
        act = Int8ActPerTensorFloat if first else Uint8ActPerTensorFloat
        out: dict[str, Any] = {
            "weight_quant": Int8WeightPerChannelFloat, "weight_bit_width": 4, "input_quant": act, "input_bit_width": 4,
            "input_collect_stats_steps": 1,  # then scales are learned, as after the first steps of any training
        }  # fmt: skip
        if learned:
            out["weight_scaling_impl_type"] = "parameter_from_stats"
        return out

    first = True
    for parent in list(net.modules()):
        for key, m in list(parent.named_children()):
            if type(m) is nn.Conv2d:
                new: Any = qnn.QuantConv2d(
                    m.in_channels, m.out_channels, m.kernel_size, m.stride, m.padding, m.dilation, m.groups,
                    bias=m.bias is not None, **quantizers(first),
                )  # fmt: skip
            elif type(m) is nn.Linear:
                new = qnn.QuantLinear(m.in_features, m.out_features, bias=m.bias is not None, **quantizers(first))
            else:
                continue
            new.weight.data.copy_(m.weight.data)
            setattr(parent, key, new)
            first = False
    net.train()
    with torch.no_grad():
        for _ in range(2):
            net(images)
    return net


def torch_fx(net: nn.Module, images: torch.Tensor) -> nn.Module:
    """PyTorch's own QAT layers, observers off, as after their warm-up."""
    from torch.ao.nn import qat
    from torch.ao.quantization import (
        FakeQuantize,
        MovingAverageMinMaxObserver,
        PerChannelMinMaxObserver,
        QConfig,
        disable_observer,
    )

    weight = FakeQuantize.with_args(
        observer=PerChannelMinMaxObserver, quant_min=-8, quant_max=7, dtype=torch.qint8,
        qscheme=torch.per_channel_symmetric, ch_axis=0,
    )  # fmt: skip
    act = FakeQuantize.with_args(
        observer=MovingAverageMinMaxObserver, quant_min=0, quant_max=15, dtype=torch.quint8,
        qscheme=torch.per_tensor_affine,
    )  # fmt: skip
    config = QConfig(activation=act, weight=weight)
    for parent in list(net.modules()):
        for key, m in list(parent.named_children()):
            if type(m) in (nn.Conv2d, nn.Linear):
                m.qconfig = config  # type: ignore[assignment]
                twin = (qat.Conv2d if isinstance(m, nn.Conv2d) else qat.Linear).from_float(m)
                setattr(parent, key, nn.Sequential(act(), twin))
    net.train()
    with torch.no_grad():
        net(images)
    net.apply(disable_observer)
    return net


def fused(net: nn.Module) -> nn.Module:
    """Refused where there is no NVIDIA GPU."""
    from hawq_lightning.quantization import use_kernel

    return use_kernel(net, "triton")


def compiled(net: nn.Module) -> nn.Module:
    """As it stands; the first step, which compiles, is not counted."""
    return torch.compile(net)  # type: ignore[return-value]


BUILD: dict[str, Callable[[nn.Module, torch.Tensor], nn.Module]] = {
    "float": lambda net, x: net,
    "uniform": lambda net, x: ours(net, x, "uniform"),
    "lsq": lambda net, x: ours(net, x, "lsq"),
    "brevitas": lambda net, x: brevitas(net, x, learned=False),
    "brevitas_lsq": lambda net, x: brevitas(net, x, learned=True),
    "torch_fx": torch_fx,
    "uniform_triton": lambda net, x: fused(ours(net, x, "uniform")),
    "float_compiled": lambda net, x: compiled(net),
    "uniform_compiled": lambda net, x: compiled(ours(net, x, "uniform")),
}


def measure(method: str, name: str, steps: int, device: str, precision: str) -> dict[str, float]:
    torch.set_num_threads(1)
    forwards = prepare(device, precision)
    images, side, classes = NETWORKS[name]
    torch.manual_seed(1)
    x, y = torch.randn(images, 3, side, side), torch.randint(0, classes, (images,))
    x, y = x.to(device), y.to(device)
    net = BUILD[method](network(name).to(device), x[:8]).to(device).train()
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-4, momentum=0.9)
    for p in net.parameters():  # the optimizer's state is not the step's
        p.grad = torch.zeros_like(p)
    optimizer.step()
    gc.collect()
    peak = Peak(device)
    seconds = []
    for _ in range(steps + 1):
        start = now(device)  # of this one thread: others' load does not count
        optimizer.zero_grad()
        with forwards:
            loss = F.cross_entropy(net(x), y)
        loss.backward()
        optimizer.step()
        seconds.append(now(device) - start)
    assert bool(torch.isfinite(loss.detach()))
    return {"seconds": min(seconds[1:]), "memory": peak()}


def run(method: str, name: str, args: argparse.Namespace) -> dict[str, float] | None:
    where = ["--device", args.device, "--precision", args.precision]
    done = subprocess.run(
        [sys.executable, __file__, "--one", method, "--networks", name, "--steps", str(args.steps), *where],
        capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    if done.returncode:
        print(f"{method} on {name}: {done.stderr.strip().splitlines()[-1]}", file=sys.stderr)
        return None
    return json.loads(done.stdout.strip().splitlines()[-1])  # type: ignore[no-any-return]


def table(record: dict[str, Any]) -> str:
    where = "one thread" if record.get("device", "cpu") == "cpu" else record["precision"]
    gpu = record.get("device", "cpu") == "cuda"
    options = f" --device cuda --precision {record['precision']}" if gpu else ""
    lines = [
        "# A W4A4 training step over the float step",
        "",
        f"`python benchmarks/training_step.py{options}`, {record['date']}, {record['cpu']}, {where}, torch "
        f"{record['versions']['torch']}, {record['rounds']} rounds of {record['steps']} steps, load average "
        f"{record['load']:.1f} at the start. Median over rounds, range in brackets; memory is the largest of them.",
    ]
    for name, rows in record["networks"].items():
        images, side, _ = NETWORKS[name]
        lines += ["", f"{name}, {images} images of {side} x {side}", ""]
        lines += ["| | step | over float | memory | over float |", "|---|---|---|---|---|"]
        base = rows["float"]
        for method, row in rows.items():
            ratios = [s / b for s, b in zip(row["seconds"], base["seconds"])]
            ratio, memory = statistics.median(ratios), max(row["memory"]) / max(base["memory"])
            version = record["versions"].get(method.split("_")[0], "")
            lines.append(
                f"| {(METHODS | ON_A_GPU)[method]} {version}".rstrip()
                + f" | {statistics.median(row['seconds']):.2f} s | "
                f"{ratio:.2f}x ({min(ratios):.2f}-{max(ratios):.2f}) | {max(row['memory']):.0f} MiB | {memory:.2f}x |"
            )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", help="by default resnet20,resnet18; on a GPU resnet50")
    parser.add_argument("--methods", help=f"of {', '.join(METHODS | ON_A_GPU)}; by default the first six, on a GPU all")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    add_device(parser)
    args = parser.parse_args()
    gpu = args.device == "cuda"
    args.networks = args.networks or ("resnet50" if gpu else "resnet20,resnet18")
    args.methods = args.methods or ",".join(METHODS | ON_A_GPU if gpu else METHODS)
    if args.one:
        print(json.dumps(measure(args.one, args.networks, args.steps, args.device, args.precision)))
        return
    prepare(args.device)
    from importlib.metadata import PackageNotFoundError, version

    versions = {"torch": torch.__version__}
    for package in ("brevitas",):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            print(f"{package} is absent", file=sys.stderr)
    record: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"), "cpu": machine(args.device), "device": args.device,
        "precision": args.precision, "versions": versions, "rounds": args.rounds,
        "steps": args.steps, "load": os.getloadavg()[0], "networks": {},
    }  # fmt: skip
    for name in args.networks.split(","):
        rows: dict[str, dict[str, list[float]]] = {}
        absent: set[str] = set()
        for _ in range(args.rounds):
            for method in args.methods.split(","):
                if method in absent:
                    continue
                found = run(method, name, args)
                if found is None:
                    absent.add(method)
                    continue
                for key, value in found.items():
                    rows.setdefault(method, {}).setdefault(key, []).append(value)
                print(name, method, found, flush=True)
        record["networks"][name] = rows
        args.out.mkdir(exist_ok=True)
        file = args.out / suffixed("training_step", args.device, args.precision)
        file.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
        file.with_suffix(".md").write_text(table(record))
    print(table(record))


if __name__ == "__main__":
    main()
