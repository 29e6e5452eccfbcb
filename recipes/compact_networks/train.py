"""Trains a compact network on CIFAR-10 from scratch, on one CPU core.

    OMP_NUM_THREADS=1 python recipes/compact_networks/train.py squeezenext_cifar /data/cifar10 OUT

Images stay in memory as bytes; a batch is shifted by up to 4 pixels and mirrored as one gather. SGD with a one-cycle
schedule, channels last, SqueezeNext in bfloat16 where the machine has AVX-512 (without it, and in depthwise
convolutions, bfloat16 is slower than float32).
After every epoch a checkpoint is written; the same command goes on from it. Written to OUT: NETWORK.pt (state dict),
NETWORK.json (accuracy on ``val`` and seconds by epoch), images.pt.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hawq_lightning import models
from hawq_lightning.data import ImageFolderDataModule, TensorImages

NETS = ("squeezenext_cifar", "mobilenet_cifar")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # as conf/data/image_folder.yaml
SHIFT, BATCH, MOMENTUM, DECAY = 4, 128, 0.9, 5e-4


def images_of(folder: Path, cache: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """``train`` and ``val`` of an image folder: bytes ``[N, 3, 32, 32]`` and labels ``[N]``; kept in ``cache``."""
    if not cache.is_file():
        data = ImageFolderDataModule(folder, num_classes=10, augment="none", memory=True)
        data.setup("fit")
        sets = {"train": data.train_dataloader().dataset, "val": data.val_dataloader().dataset}
        assert all(isinstance(s, TensorImages) for s in sets.values())
        torch.save({k: (s.images, s.labels) for k, s in sets.items()}, cache)  # type: ignore[attr-defined]
    found: dict[str, tuple[Tensor, Tensor]] = torch.load(cache, weights_only=True)
    return found


def normalised(images: Tensor) -> Tensor:
    """Bytes to floats, channels last in memory."""
    mean, std = (255 * torch.tensor(x).view(-1, 1, 1) for x in (MEAN, STD))
    return ((images.float() - mean) / std).contiguous(memory_format=torch.channels_last)


def shifted(images: Tensor, generator: torch.Generator) -> Tensor:
    """Every image moved by up to ``SHIFT`` pixels each way and, half of the time, mirrored; bytes ``[N, C, H, W]``."""
    count, _, height, width = images.shape
    padded = F.pad(images, (SHIFT,) * 4)
    top, left = torch.randint(0, 2 * SHIFT + 1, (2, count, 1), generator=generator)
    rows, columns = top + torch.arange(height), left + torch.arange(width)
    mirrored = torch.rand(count, 1, generator=generator) < 0.5
    columns = torch.where(mirrored, columns.flip(1), columns)
    picked = padded[torch.arange(count)[:, None, None], :, rows[:, :, None], columns[:, None, :]]
    return picked.permute(0, 3, 1, 2)


@torch.no_grad()
def accuracy(net: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Share of right answers, 0 to 1."""
    net.eval()
    right = sum(int((net(normalised(x)).argmax(1) == y).sum()) for x, y in zip(images.split(500), labels.split(500)))
    return right / len(labels)


def main() -> None:
    """Train, or go on."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("network", choices=NETS)
    parser.add_argument("data", type=Path, help="folder with train/<class>/ and val/<class>/")
    parser.add_argument("out", type=Path)
    parser.add_argument("--epochs", type=int, default=16)
    parser.add_argument("--lr", type=float, default=0.15, help="peak")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    data = images_of(args.data, args.out / "images.pt")
    images, labels = data["train"]
    torch.manual_seed(args.seed)
    net: nn.Module = getattr(models, args.network)()
    net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.SGD(net.parameters(), args.lr, MOMENTUM, weight_decay=DECAY, nesterov=True)
    steps = len(images) // BATCH
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, total_steps=args.epochs * steps, pct_start=0.25)
    parts: dict[str, Any] = {"net": net, "optimizer": optimizer, "schedule": schedule}
    checkpoint, history = args.out / f"{args.network}.checkpoint.pt", list[dict[str, float]]()
    if checkpoint.is_file():
        known = torch.load(checkpoint, weights_only=True)
        for name, part in parts.items():
            part.load_state_dict(known[name])
        history = known["history"]
    half = args.network == "squeezenext_cifar" and torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    for epoch in range(len(history), args.epochs):
        began, used = time.perf_counter(), time.process_time()
        generator = torch.Generator().manual_seed(1000 * args.seed + epoch)
        net.train()
        for rows in torch.randperm(len(images), generator=generator)[: steps * BATCH].split(BATCH):
            x = normalised(shifted(images[rows], generator))
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                logits = net(x)
            loss = F.cross_entropy(logits.float(), labels[rows])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
        score = accuracy(net, *data["val"])
        history.append({
            "accuracy": score, "loss": float(loss.detach()), "seconds": time.perf_counter() - began,
            "cpu_seconds": time.process_time() - used,
        })  # fmt: skip
        print(args.network, epoch + 1, history[-1], flush=True)
        part_file = checkpoint.with_suffix(".part")
        torch.save({k: p.state_dict() for k, p in parts.items()} | {"history": history}, part_file)
        part_file.replace(checkpoint)
    torch.save({k: v.contiguous() for k, v in net.state_dict().items()}, args.out / f"{args.network}.pt")
    (args.out / f"{args.network}.json").write_text(json.dumps({"epochs": history}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
