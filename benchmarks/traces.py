"""Seconds and memory to a 5% standard error of every layer's Hessian trace: ours and other packages', same images.

    pip install pyhessian backpack-for-pytorch curvlinops-for-pytorch
    pip install model-compression-toolkit nvidia-modelopt huggingface_hub  # layer scores, see layer_scores.py
    python benchmarks/traces.py [--data CIFAR10_FOLDER] [--weights RESNET20.pt] [--seconds 10]
        [--bccd BCCD_FOLDER --detector RETINANET.ckpt]

Every method runs in a process of its own, on one thread, on the same trained network and the same batch of training
images (ResNet20 on CIFAR-10; ResNet20 on scikit-learn's digits, trained here for some seconds; the small RetinaNet of
recipes/bccd_retinanet, whose checkpoint has to be given, on 16 images of blood cells). All get their best case: one
batch, so that a gradient graph is built once; only the weights of convolutions and the linear layer; methods that allow
it take one block a layer. Ours also measures every activation in the same time.

How the figures come about: ours is the wall time of a whole ``measure`` to 5% on the worst site. Of the others,
``seconds`` are spent on probes; a probe's relative standard deviation at a layer, s, and its time, t, give
``(s / 0.05)^2 t``. Where that is more than was run, it is an extrapolation and says so. Deviations are relative to the
exact trace (all columns of the output; for the detector, whose outputs are too many, to our own from 16 probes). Memory
is the peak resident set beyond what model, data and imports hold. Packages that are absent are left out.
Results: benchmarks/results/traces.{json,md}.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import layer_scores
import torch
from torch import nn
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
TARGET = 0.05
DETECTOR_IMAGES = 16
REFERENCE_PROBES = 16  # of the detector, whose exact traces would take thousands of columns
DETECTOR_METHODS = ("ours_exact", "ours", "pyhessian", "curvlinops_hessian")  # the others want one loss on one output
METHODS = {
    "ours": "ours, all weights and activations",
    "ours_exact": "ours, exact columns",
    "pyhessian": "PyHessian 0.1, joint HVP",
    "curvlinops_hessian": "curvlinops Hessian blocks",
    "curvlinops_ggn": "curvlinops GGN, joint",
    "curvlinops_mc": "curvlinops Fisher MC, joint",
    "backpack_mc": "BackPACK DiagGGNMC",
    "backpack_exact": "BackPACK DiagGGNExact",
    "mct": "MCT 2.6 Hessian scores of weights",
    "modelopt": "ModelOpt 0.47 gradient scores, int8 weights",
}


class Block(nn.Module):
    """A basic block in modules only, its option A shortcut as a fixed 1x1 convolution: what other packages can read."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.body = nn.Sequential(block.conv1, block.bn1, nn.ReLU(), block.conv2, block.bn2)
        self.short: nn.Module = nn.Identity()
        if block.stride != 1 or block.widen:
            ins, outs = block.conv1.in_channels, block.conv1.out_channels
            self.short = nn.Conv2d(ins, outs, 1, block.stride, bias=False)
            with torch.no_grad():
                self.short.weight.zero_()
                for i in range(ins):
                    self.short.weight[block.widen // 2 + i, i] = 1.0
        self.relu = nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Images to images."""
        return self.relu(self.body(x) + self.short(x))


def in_modules(net: Any) -> nn.Module:
    blocks = [Block(b) for stage in (net.layer1, net.layer2, net.layer3) for b in stage]
    return nn.Sequential(net.conv1, net.bn1, nn.ReLU(), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), net.linear)


class Detector(nn.Module):
    """A detector as other packages want a network: images in, and here the loss itself out."""

    def __init__(self, inner: nn.Module, targets: Any) -> None:
        super().__init__()
        self.inner, self.targets = inner, targets

    def forward(self, images: Any) -> torch.Tensor:
        """The summed losses."""
        return torch.stack(list(self.inner(images, self.targets).values())).sum()

    def train(self, mode: bool = True) -> Detector:
        """Losses come in training mode only; BatchNorm uses its running statistics all the same."""
        self.inner.train()
        for module in self.inner.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        return self


def detector(args: argparse.Namespace) -> tuple[nn.Module, Any, Any]:
    from hawq_lightning.data import CocoData
    from hawq_lightning.models import retinanet_resnet18

    data = CocoData(args.bccd, num_classes=3, batch_size=DETECTOR_IMAGES, num_workers=0, longest=320, hflip=False)
    data.setup("fit")
    torch.manual_seed(0)
    x, y = next(iter(data.train_dataloader()))
    net = retinanet_resnet18(3, anchor_size=16)  # smooth L1, which has curvature
    state = torch.load(args.detector, weights_only=True, map_location="cpu")["state_dict"]
    net.load_state_dict({k.removeprefix("net."): v for k, v in state.items() if k.startswith("net.")})
    return Detector(net, y).train(), x, y


def load(name: str, args: argparse.Namespace) -> tuple[nn.Module, Any, Any]:
    if name == "bccd":
        plain, x, y = detector(args)
        return only_weights(plain), x, y
    from hawq_lightning.models import resnet20

    if name == "cifar10":
        from hawq_lightning.data import ImageFolderDataModule

        data = ImageFolderDataModule(args.data, num_classes=10, augment="none", batch_size=args.images, memory=False)
        net = resnet20(weights=args.weights)
    else:
        from hawq_lightning.data import DigitsDataModule

        data, net = DigitsDataModule(batch_size=args.images, shift=0), resnet20(in_channels=1)
        net.load_state_dict(torch.load(args.digits, weights_only=True))
    data.setup("fit")
    torch.manual_seed(0)
    x, y = next(iter(data.train_dataloader()))
    plain = in_modules(net).eval()
    with torch.no_grad():
        assert torch.allclose(plain(x[:4]), net.eval()(x[:4]), atol=1e-4)
    return only_weights(plain), x, y


def only_weights(net: nn.Module) -> nn.Module:
    for p in net.parameters():
        p.requires_grad_(False)
    for _, layer in weights_of(net):
        layer.weight.requires_grad_(True)
    return net


def criterion(net: nn.Module) -> Callable[[torch.Tensor, Any], torch.Tensor]:
    return (lambda loss, y: loss) if isinstance(net, Detector) else nn.CrossEntropyLoss()


def weights_of(net: nn.Module) -> list[tuple[str, Any]]:
    return [(n, m) for n, m in net.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear)) and not n.endswith("short")]


def train_digits(path: Path, epochs: int = 8) -> float:
    from hawq_lightning.data import DigitsDataModule
    from hawq_lightning.models import resnet20

    torch.manual_seed(0)
    data, net = DigitsDataModule(batch_size=64), resnet20(in_channels=1)
    data.setup("fit")
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, epochs * len(data.train_dataloader()))
    for _ in range(epochs):
        for x, y in data.train_dataloader():
            optimizer.zero_grad()
            F.cross_entropy(net(x), y, label_smoothing=0.1).backward()
            optimizer.step()
            schedule.step()
    torch.save(net.state_dict(), path)
    net.eval()
    with torch.no_grad():
        hits = [(net(x).argmax(1) == y).float().mean().item() for x, y in data.val_dataloader()]
    return statistics.mean(hits)


Probe = Callable[[int], list[float]]


def signs(like: list[torch.Tensor], seed: int) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 2, p.shape, generator=g).mul_(2).sub_(1).to(p) for p in like]


def dots(a: list[torch.Tensor], b: Any) -> list[float]:
    return [float((x.double() * y.double()).sum()) for x, y in zip(a, b)]


def pyhessian(net: nn.Module, x: Any, y: Any) -> Probe:
    from pyhessian import hessian
    from pyhessian.utils import hessian_vector_product

    h = hessian(net, criterion(net), data=(x, y), cuda=False)
    return lambda seed: dots(v := signs(h.params, seed), hessian_vector_product(h.gradsH, h.params, v))


def curvlinops(kind: str) -> Callable[[nn.Module, torch.Tensor, torch.Tensor], Probe]:
    def make(net: nn.Module, x: torch.Tensor, y: torch.Tensor) -> Probe:
        import curvlinops as c

        params = [m.weight for _, m in weights_of(net)]
        operator = {
            "hessian": c.HessianLinearOperator, "ggn": c.GGNLinearOperator, "mc": c.FisherMCLinearOperator,
        }[kind]  # fmt: skip

        def probe(seed: int) -> list[float]:
            # of the three only the Hessian can be split into a block a layer
            more = {
                "hessian": {"block_sizes": [1] * len(params)}, "ggn": {}, "mc": {"mc_samples": 1, "seed": seed},
            }[kind]  # fmt: skip
            h = operator(net, criterion(net), params, [(x, y)], check_deterministic=False, **more)
            return dots(v := signs(params, seed), h @ v)

        return probe

    return make


def backpack(exact: bool) -> Callable[[nn.Module, torch.Tensor, torch.Tensor], Probe]:
    def make(net: nn.Module, x: torch.Tensor, y: torch.Tensor) -> Probe:
        from backpack import backpack as active
        from backpack import extend
        from backpack.extensions import DiagGGNExact, DiagGGNMC

        params = [m.weight for _, m in weights_of(net)]
        net = extend(net, use_converter=True).eval()
        loss = extend(nn.CrossEntropyLoss())

        def probe(seed: int) -> list[float]:
            torch.manual_seed(seed)
            with active(DiagGGNExact() if exact else DiagGGNMC(mc_samples=1)):
                loss(net(x), y).backward()
            found = [float((p.diag_ggn_exact if exact else p.diag_ggn_mc).double().sum()) for p in params]
            for p in net.parameters():
                p.grad = None
                for name in ("diag_ggn_exact", "diag_ggn_mc"):
                    if hasattr(p, name):
                        delattr(p, name)
            return found

        return probe

    return make


OTHERS = {
    "pyhessian": pyhessian,
    "curvlinops_hessian": curvlinops("hessian"),
    "curvlinops_ggn": curvlinops("ggn"),
    "curvlinops_mc": curvlinops("mc"),
    "backpack_mc": backpack(exact=False),
    "backpack_exact": backpack(exact=True),
}


def resident() -> float:
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def work(method: str, name: str, args: argparse.Namespace) -> dict[str, Any]:
    """One method on one network, in this process."""
    torch.set_num_threads(1)
    net, x, y = load(name, args)
    with torch.no_grad():
        net(x if isinstance(net, Detector) else x[:2])
    before = resident()
    out: dict[str, Any] = {"method": method, "network": name}
    if method.startswith("ours"):
        from hawq_lightning import measure

        exact = method == "ours_exact"

        def loss(m: Any, b: Any) -> torch.Tensor:
            return sum(m.inner(*b).values()) if isinstance(m, Detector) else F.cross_entropy(m(b[0]), b[1])

        def run(seed: int) -> Any:
            return measure(
                net, [(x, y)], loss, exclude=None if name == "bccd" else ["*short*"], seed=seed + exact, progress=False,
                estimator="exact" if exact and name != "bccd" else "auto", rtol=TARGET,
                sampling="all" if exact else "auto", max_probes=REFERENCE_PROBES if exact else 1000,
            )  # fmt: skip

        seconds, found = [], []
        for seed in range(1 if exact or name == "bccd" else 3):
            began = time.perf_counter()
            found.append(run(seed))
            seconds.append(time.perf_counter() - began)
        last = found[-1]
        weights = [last[f"{n}.weight"] for n, _ in weights_of(net)]
        out |= {
            "seconds": statistics.median(seconds), "all_seconds": seconds, "probes": last.settings["probes"],
            "estimator": last.settings["estimator"], "sites": len(last),
            "trace": [r.trace for r in weights], "stderr": [r.stderr for r in weights],
            "worst_any_site": max(r.stderr / r.trace for r in last), "draw": last.settings["draw"],
        }  # fmt: skip
    elif method in layer_scores.SCORES:
        out |= layer_scores.SCORES[method](net, x, y, [n for n, _ in weights_of(net)], args.seconds)
    else:
        began = time.perf_counter()
        probe = OTHERS[method](net, x, y)
        rows, times = [probe(0)], []
        setup = time.perf_counter() - began
        began = time.perf_counter()
        while len(rows) < 4 or time.perf_counter() - began < args.seconds:
            start = time.perf_counter()
            rows.append(probe(len(rows)))
            times.append(time.perf_counter() - start)
            if method == "backpack_exact" and len(rows) > 2:
                break
        values = torch.tensor(rows, dtype=torch.float64)
        out |= {
            "setup": setup, "probe_seconds": statistics.median(times), "probes": len(rows),
            "trace": values.mean(0).tolist(), "sd": values.std(0).tolist(),
        }  # fmt: skip
    out["memory_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - before
    return out


def to_target(result: dict[str, Any], exact: list[float]) -> dict[str, Any]:
    """Seconds to the target on the median and worst layer, and whether they were run or extrapolated."""
    if result["method"] == "ours_exact":
        return {"median": result["seconds"], "worst": result["seconds"], "how": "measured"}
    exact = [max(t, 1e-30) for t in exact]
    if result["method"] == "ours":
        shares = sorted(e / t for e, t in zip(result["stderr"], exact))
        probes = max(2.0, result["probes"] * (statistics.median(shares) / TARGET) ** 2)
        # the worst of all sites stopped the run; the median layer would have needed fewer probes
        return {
            "median": result["seconds"] * min(1.0, probes / result["probes"]), "worst": result["seconds"],
            "how": "measured",
        }  # fmt: skip
    shares = [s / t for s, t in zip(result["sd"], exact)]
    needed = {k: max(1.0, (f(shares) / TARGET) ** 2) for k, f in (("median", statistics.median), ("worst", max))}
    return {k: n * result["probe_seconds"] for k, n in needed.items()} | {
        "needed_probes": needed,
        "how": "measured" if needed["worst"] <= result["probes"] else "extrapolated",
    }


def agreement(result: dict[str, Any], exact: list[float]) -> float:
    """The largest difference from the exact traces in standard errors."""
    errors = result.get("stderr") or [s / result["probes"] ** 0.5 for s in result.get("sd", [])]
    return max(
        (abs(a - b) / e if e > 1e-4 * b else (0.0 if abs(a - b) < 1e-2 * b else float("inf")))
        for a, b, e in zip(result["trace"], exact, errors or [0.0] * len(exact))
    )


def table(report: dict[str, Any]) -> str:
    lines = [
        "# Seconds and memory to 5% standard error of every layer's trace", "",
        f"{report['date']}, {report['machine']}, torch {report['torch']}, one thread, "
        f"load {report['load']:.1f} before; {report['images']} fixed training images in one batch. "
        "Made by `benchmarks/traces.py`, whose head says how.",
        "",
    ]  # fmt: skip
    for part in report["networks"].values():
        lines += [
            f"## {part['title']}", "",
            "| method | median layer, s | worst layer, s | how | a probe, s | median x ours | worst x ours "
            "| memory, MiB | largest z |",
            "|---|---:|---:|---|---:|---:|---:|---:|---:|",
        ]  # fmt: skip
        for method, r in part["methods"].items():
            if method in layer_scores.SCORES:
                continue
            if "error" in r:
                lines.append(f"| {METHODS[method]} | - | - | failed: {r['error']} | - | - | - | - | - |")
                continue
            label = "ours, 16 probes, the reference" if r.get("reference") else METHODS[method]
            lines.append(
                f"| {label} | {r['median']:.3g} | {r['worst']:.3g} | {r['how']} | "
                f"{r.get('probe_seconds', r.get('seconds', 0) / max(1, r['probes'])):.3g} | {r['median_ratio']:.3g} | "
                f"{r['worst_ratio']:.3g} | {r['memory_mib']:.0f} | {r['z']:.1f} |"
            )
        lines += [*layer_scores.rows(part["methods"], METHODS), ""]
    if any(m in layer_scores.SCORES for part in report["networks"].values() for m in part["methods"]):
        lines += ["## Layer scores of other packages", "", layer_scores.HEADING, ""]
    return "\n".join(lines)


def main() -> None:
    shared = ROOT.parent / "shared" / "data"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("/tmp/data/cifar10"), help="folder with train/ and val/")
    parser.add_argument("--weights", type=Path, default=shared / "resnet20_cifar10.pt")
    parser.add_argument("--bccd", type=Path, default=shared / "bccd", help="folder in COCO's layout")
    parser.add_argument("--detector", type=Path, help="float checkpoint of recipes/bccd_retinanet")
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--seconds", type=float, default=10.0, help="of probes, each package and network")
    parser.add_argument("--limit", type=float, default=1800.0, help="seconds a method at the most")
    parser.add_argument("--networks", nargs="+", default=["cifar10", "digits", "bccd"])
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--worker", nargs=2, metavar=("METHOD", "NETWORK"), help=argparse.SUPPRESS)
    parser.add_argument("--digits", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(work(*args.worker, args)))
        return
    torch.set_num_threads(1)
    report: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"), "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "torch": torch.__version__, "load": os.getloadavg()[0], "images": args.images, "target": TARGET, "networks": {},
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        digits = Path(folder) / "digits.pt"
        accuracy = train_digits(digits) if "digits" in args.networks else 0.0
        titles = {
            "cifar10": "ResNet20 on CIFAR-10, trained",
            "digits": f"ResNet20 on scikit-learn's digits, trained to {accuracy:.1%}",
            "bccd": f"RetinaNet-ResNet18 on BCCD, trained, {DETECTOR_IMAGES} images of 320 x 240",
        }
        for name in args.networks:
            if name == "bccd" and not (args.bccd.is_dir() and args.detector and args.detector.is_file()):
                print(f"left out {name}: no {args.bccd} or --detector")
                continue
            if name == "cifar10" and not (args.data.is_dir() and args.weights.is_file()):
                print(f"left out {name}: no {args.data} or {args.weights}")
                continue
            methods: dict[str, Any] = {}
            for method in dict.fromkeys(["ours_exact", *args.methods]):
                if name == "bccd" and method not in DETECTOR_METHODS:
                    continue
                command = [
                    sys.executable, __file__, "--worker", method, name, "--data", str(args.data), "--weights",
                    str(args.weights), "--images", str(args.images), "--seconds", str(args.seconds),
                    "--digits", str(digits), "--bccd", str(args.bccd), "--detector", str(args.detector),
                ]  # fmt: skip
                try:
                    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=args.limit)
                except subprocess.TimeoutExpired:
                    methods[method] = {"error": f"more than {args.limit:.0f} s for one method"}
                    continue
                if done.returncode:
                    methods[method] = {"error": (done.stderr.strip().splitlines() or ["?"])[-1][:150]}
                else:
                    methods[method] = json.loads(done.stdout.strip().splitlines()[-1])
                print(name, method, methods[method].get("error", "ok"), flush=True)
            if name == "bccd":
                methods["ours_exact"]["reference"] = True
            if "error" in methods["ours_exact"]:
                print(f"left out {name}: {methods['ours_exact']['error']}")
                continue
            exact = methods["ours_exact"]["trace"]
            traces = [r for m, r in methods.items() if "error" not in r and m not in layer_scores.SCORES]
            scores = [r for m, r in methods.items() if "error" not in r and m in layer_scores.SCORES]
            for r in traces:
                r |= to_target(r, exact) | {"z": agreement(r, exact)}
            ours = methods.get("ours", methods["ours_exact"])
            for r in scores:
                r |= layer_scores.summary(r, exact, TARGET) | {"recipe_ratio": r["seconds"] / ours["worst"]}
            for r in traces:
                r |= {f"{k}_ratio": r[k] / ours[k] for k in ("median", "worst")}
            report["networks"][name] = {"title": titles[name], "methods": methods}
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "traces.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    (args.out / "traces.md").write_text(text := table(report), encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
