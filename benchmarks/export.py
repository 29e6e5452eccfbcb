"""Sizes of the exported files, and whether they hold the same network: the paper's four models and ResNet20.

    python benchmarks/export.py [--models resnet20,squeezenext] [--images 4] [--out benchmarks/results/export.md]

Weights are random, which changes no size; widths 2, 3, 4, 5, 6 and 8 take turns over the layers, activations have 8
bits over the range seen. The packed file is loaded into another network of the same kind, whose outputs and state must
be equal bit for bit. It may take 1.01 x (codes + scales + rest) + 160 bytes a tensor, whose names and places stand in
the file's header; the script fails otherwise, or where the reload is not exact. The ONNX file passes onnx's checker and
runs on random images of reduced size in onnxruntime. Random weights of two bits make chaos of 50 layers: a code that
flips by rounding flips many more below it. How well trained networks agree is measured on real images
(docs/results.md).
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from itertools import cycle
from pathlib import Path

import torch
from torch import nn

from hawq_lightning import HawqError, Plan, PlanSite, SiteTable, load_packed, quantize, save_packed, sites
from hawq_lightning.export import compare, network_of, read_packed, to_onnx
from hawq_lightning.models import inception_v3, resnet20, resnet50, retinanet_resnet50, squeezenext

MODELS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "resnet20": (resnet20, 32),
    "squeezenext": (squeezenext, 96),
    "inception_v3": (inception_v3, 128),
    "resnet50": (resnet50, 96),
    "retinanet_resnet50": (retinanet_resnet50, 128),
}
WIDTHS = (2, 3, 4, 5, 6, 8)
ALLOWANCE = 160  # bytes a tensor


def turns(
    net: nn.Module, table: SiteTable, x: torch.Tensor, widths: tuple[int, ...] = WIDTHS, code: str = "affine"
) -> Plan:
    """A plan whose widths take turns, with activation grids over the range of ``x``."""
    low: dict[str, float] = {}
    high: dict[str, float] = {}

    def hook(name: str) -> Callable[..., None]:
        def note(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            low[name] = min(low.get(name, 0.0), float(args[0].min()))
            high[name] = max(high.get(name, 0.0), float(args[0].max()))

        return note

    handles = [net.get_submodule(n).register_forward_pre_hook(hook(n)) for s in table for n in s.layers]
    with torch.no_grad():
        net(x)
    for handle in handles:
        handle.remove()
    chosen = [
        PlanSite(s.name, s.kind, s.layers, s.shape, s.numel, bits, code)
        for s, bits in zip(table.weights, cycle(widths))
    ]
    for s in table.activations:
        bottom, top = min(low[n] for n in s.layers), max(high[n] for n in s.layers)
        step = max(top - bottom, 1e-6) / 255
        chosen.append(PlanSite(s.name, s.kind, s.layers, s.shape, s.numel, 8, "affine", step, round(-bottom / step)))
    return Plan(tuple(chosen), table.layers)


def measured(name: str, images: int, folder: Path) -> list[str]:
    """One row of the table."""
    make, size = MODELS[name]
    start = time.perf_counter()
    torch.manual_seed(0)
    net = network_of(make()).eval()
    x = torch.randn(images, 3, size, size)
    floats = sum(t.numel() * t.element_size() for t in net.state_dict().values())
    table = sites(net, x[:2])
    plan = turns(net, table, x)
    quantize(net, plan)
    packed = save_packed(net, plan, folder / "model.safetensors")
    held = read_packed(folder / "model.safetensors")
    codes = sum((s.numel * s.bits + 7) // 8 for s in plan.weights)
    scales = sum(t.nbytes for s in held.weights for t in s.storage.tensors.values())
    rest = sum(t.numel() * t.element_size() for t in held.rest.values())
    tensors = len(held.rest) + sum(1 + len(s.storage.tensors) for s in held.sites)
    bound = 1.01 * (codes + scales + rest) + ALLOWANCE * tensors
    if packed > bound:
        raise HawqError(f"{name}: the packed file takes {packed:,} bytes, more than {bound:,.0f}.")
    torch.manual_seed(1)
    again = network_of(make()).eval()
    load_packed(folder / "model.safetensors", again)
    with torch.no_grad():
        outputs = [torch.utils._pytree.tree_leaves(n(x)) for n in (net, again)]
    if not all(torch.equal(a, b) for a, b in zip(*outputs, strict=True)):
        raise HawqError(f"{name}: the reloaded network gives other outputs.")
    deployed = to_onnx(net, plan, x[:2], folder / "model.onnx")
    onnx = (folder / "model.onnx").stat().st_size
    found = compare(net, folder / "model.onnx", [x])
    flipped = sum(found.flipped.values()) / max(1, sum(found.codes.values()))
    # random weights amplify every flip, so the outputs' own spread is the measure
    moved = ", ".join(
        f"{k} {mean / float(y.std()):.1%}" for (k, (_, mean)), y in zip(found.outputs.items(), outputs[0])
    )
    print(f"{name}: {time.perf_counter() - start:.0f} s", flush=True)
    return [
        name,
        f"{len(plan.weights)}",
        f"{floats / 2**20:.2f}",
        f"{codes / 2**20:.3f}",
        f"{packed / 2**20:.3f}",
        f"{packed / (codes + scales + rest):.4f}",
        "yes",
        f"{onnx / 2**20:.3f}",
        f"{len(deployed.folding.folded)} of {len(deployed.folding.folded) + len(deployed.folding.kept)}",
        f"{flipped:.3%}",
        moved,
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--images", type=int, default=4)
    parser.add_argument("--out", type=Path, help="write the table there as well")
    args = parser.parse_args()
    heads = ["model", "weights", "float, MiB", "codes, MiB", "packed, MiB", "packed / content", "reload bit-exact",
             "ONNX, MiB", "BatchNorms folded", "codes flipped", "mean difference / spread of outputs"]  # fmt: skip
    rows = []
    for name in args.models.split(","):
        with tempfile.TemporaryDirectory() as folder:
            rows.append(measured(name, args.images, Path(folder)))
    lines = [f"| {' | '.join(r)} |" for r in (heads, ["---"] + ["---:"] * (len(heads) - 1), *rows)]
    text = "\n".join(
        [
            "# What the exported files take",
            "",
            f"Made by `benchmarks/export.py --images {args.images}`, torch {torch.__version__}. Every file stayed "
            "below 1.01 x content + 160 bytes a tensor, content being codes, scales and whatever is not quantized.",
            "",
            *lines,
            "",
            "Weights are random: a code that flips by rounding flips more from layer to layer, which says little about "
            "a trained network.",
            "",
            "Speeds, and the integer files' sizes: [export_speed.md](export_speed.md).",
        ]
    )
    print(text)
    if args.out:
        args.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
