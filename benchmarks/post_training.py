"""What quantization without training keeps: ResNet20 at 2 to 4 bits, nearest rounding and post-training methods.

    python benchmarks/post_training.py --data CIFAR10_FOLDER --weights RESNET20.pt [--bits 3,4] [--images 256]
    python benchmarks/post_training.py --digits [--bits 3,4]

All weights have the same bits, activations 8 (calibrated on the same images). The images come from the train set; the
accuracy is on ``--score`` images of ``val``, drawn once. With ``--digits`` the float network is trained here, on
scikit-learn's digits. What the results hold for the same images is not done again: take them away to measure anew.
Results: benchmarks/results/post_training_*.{json,md}.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Subset

import hawq_lightning as hl
from hawq_lightning import Plan, PlanSite
from hawq_lightning.quantization import activation_step, quantize, unquantize
from hawq_lightning.quantization.post_training import METHODS, FloatReference

RESULTS = Path(__file__).resolve().parent / "results"
TRIALS: dict[str, tuple[str, ...]] = {
    "nearest": (),
    "bias correction": ("bias_correction",),
    "BatchNorm statistics": ("batchnorm",),
    "BatchNorm statistics, bias correction": ("batchnorm", "bias_correction"),
    "learned rounding": ("adaround",),
    "learned rounding, bias correction": ("adaround", "bias_correction"),
    "blocks": ("blocks",),
    "blocks, bias correction": ("blocks", "bias_correction"),
    "learned rounding, blocks": ("adaround", "blocks"),
    "learned rounding, BatchNorm statistics": ("adaround", "batchnorm"),
    "learned rounding, BatchNorm statistics, bias correction": ("adaround", "batchnorm", "bias_correction"),
}


def loss_of(model: nn.Module, batch: Any) -> torch.Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def draw(dataset: Any, count: int, batch: int) -> list[Any]:
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0))[:count].tolist()
    return list(DataLoader(Subset(dataset, order), batch))


@torch.no_grad()
def accuracy(model: nn.Module, batches: list[Any]) -> float:
    model.eval()
    right = sum(int((model(x).argmax(1) == y).sum()) for x, y in batches)
    return right / sum(len(y) for _, y in batches)


def cifar10(args: argparse.Namespace) -> tuple[nn.Module, list[Any], list[Any]]:
    from hawq_lightning.data import ImageFolderDataModule
    from hawq_lightning.models import resnet20

    data = ImageFolderDataModule(args.data, num_classes=10, augment="none", memory=False)
    data.setup("fit")
    net = resnet20(weights=args.weights)
    train, val = data.train_dataloader().dataset, data.val_dataloader().dataset
    return net, draw(train, args.images, 64), draw(val, args.score, 100)


def digits(args: argparse.Namespace) -> tuple[nn.Module, list[Any], list[Any]]:
    from hawq_lightning.data import DigitsDataModule
    from hawq_lightning.models import resnet20

    torch.manual_seed(1)
    data, net = DigitsDataModule(batch_size=64), resnet20(in_channels=1)
    data.setup("fit")
    epochs, loader = 8, data.train_dataloader()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, epochs * len(loader))
    for _ in range(epochs):
        for batch in loader:
            optimizer.zero_grad()
            loss_of(net, batch).backward()
            optimizer.step()
            schedule.step()
    return net, draw(loader.dataset, args.images, 64), draw(data.val_dataloader().dataset, args.score, 100)


def _copied(net: nn.Module) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in net.state_dict().items()}


def plans_of(net: nn.Module, batches: list[Any], widths: tuple[int, ...]) -> dict[int, Plan]:
    """All weights at one width, activations at 8 bits with steps for what ``batches`` give."""
    table = hl.sites(net, batches[0])
    seen: dict[str, list[torch.Tensor]] = {s.name: [] for s in table.activations}
    handles = [
        net.get_submodule(s.layers[0]).register_forward_pre_hook(
            lambda m, a, into=seen[s.name]: into.append(a[0].detach().flatten())
        )
        for s in table.activations
    ]
    accuracy(net, batches[:2])
    for handle in handles:
        handle.remove()
    reads = []
    for s in table.activations:
        x = torch.cat(seen[s.name])
        step, zero = activation_step(x[::101], float(x.min()), float(x.max()), 8)
        reads.append(PlanSite(s.name, "activation", s.layers, s.shape, s.numel, 8, "affine", step, zero))
    out = {}
    for bits in widths:
        weights = [PlanSite(s.name, "weight", s.layers, s.shape, s.numel, bits, "affine") for s in table.weights]
        out[bits] = Plan(sites=(*weights, *reads))
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data")
    parser.add_argument("--weights")
    parser.add_argument("--digits", action="store_true")
    parser.add_argument("--bits", default="3,4")
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--score", type=int, default=2000)
    args = parser.parse_args()
    net, calibration, held_out = digits(args) if args.digits else cifar10(args)
    net.eval()
    state = _copied(net)
    widths = tuple(int(b) for b in args.bits.split(","))
    float_accuracy = accuracy(net, held_out)
    plans = plans_of(net, calibration, widths)
    name = "digits" if args.digits else "cifar10"
    record = {
        "network": f"ResNet20, {name}", "float": float_accuracy, "images": sum(len(b[1]) for b in calibration),
        "score_images": sum(len(b[1]) for b in held_out),
    }  # fmt: skip
    RESULTS.mkdir(exist_ok=True)
    kept = RESULTS / f"post_training_{name}.json"
    known_record = json.loads(kept.read_text()) if kept.exists() else {}
    same = all(known_record.get(k) == v for k, v in record.items())
    rows: list[dict[str, Any]] = known_record["rows"] if same else []
    for bits, plan in plans.items():
        have = {r["method"] for r in rows if r["bits"] == bits}
        unquantize(net).load_state_dict(state)
        quantize(net, plan)
        reference, known = FloatReference(net), {(): _copied(net)}
        for label, methods in TRIALS.items():
            if label in have:
                continue
            done = max((m for m in known if methods[: len(m)] == m), key=len)  # rounding is learned once
            net.load_state_dict(known[done])
            start = time.process_time()
            for method in methods[len(done) :]:
                METHODS[method].run(net, calibration, reference=reference)
            seconds = time.process_time() - start
            known[methods] = _copied(net)
            rows.append({
                "bits": bits, "method": label, "accuracy": accuracy(net, held_out), "seconds": seconds,
            })  # fmt: skip
            print(rows[-1], flush=True)
            kept.write_text(json.dumps({**record, "rows": rows}, indent=1) + "\n")
            kept.with_suffix(".md").write_text(as_table({**record, "rows": rows}))
    print(as_table({**record, "rows": rows}))


def as_table(record: dict[str, Any]) -> str:
    widths = sorted({r["bits"] for r in record["rows"]})
    lines = [
        f"# Quantized without training: {record['network']}",
        "",
        f"`python benchmarks/post_training.py`: {record['images']} train images without their labels, accuracy on "
        f"{record['score_images']} images of `val`, activations at 8 bits. Float: {record['float']:.2%}.",
        "",
        "| weights | " + " | ".join(f"{b} bits" for b in widths) + " |",
        "|---|" + "---|" * len(widths),
    ]
    for label in TRIALS:
        found = {r["bits"]: r["accuracy"] for r in record["rows"] if r["method"] == label}
        lines.append(f"| {label} | " + " | ".join(f"{found[b]:.2%}" if b in found else "–" for b in widths) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
