"""Trained networks and what figures.py measures them on."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Subset

from hawq_lightning import models

SQUEEZENEXT, RETINANET = "squeezenext_cifar", "retinanet"
TITLES = {
    "resnet20": "ResNet20, CIFAR-10", "mobilenet_cifar": "Depthwise-separable network, CIFAR-10",
    SQUEEZENEXT: "SqueezeNext (SqNxt-23), CIFAR-10", RETINANET: "RetinaNet with ResNet18, BCCD",
}  # fmt: skip


@dataclass(frozen=True)
class Subject:
    """A trained network with what it is measured on.

    Attributes:
        name: key of ``TITLES``.
        net: in evaluation mode.
        batches: the first one is for what takes long.
        loss_fn: mean loss of a batch.
        rtol: standard error of traces to reach, with at most ``probes`` an image.
        steps: products of an eigenvector at the most.
    """

    name: str
    net: nn.Module
    batches: list[Any]
    loss_fn: Callable[[nn.Module, Any], torch.Tensor]
    rtol: float
    probes: int = 1000
    steps: int = 100

    @property
    def images(self) -> int:
        """In all batches."""
        return sum(len(b[0]) for b in self.batches)

    @property
    def few(self) -> int:
        """In the first batch."""
        return len(self.batches[0][0])


class Losses(nn.Module):
    """A detector whose forward is its summed losses, BatchNorm by its running statistics."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, images: Any, targets: Any) -> torch.Tensor:
        """Mean over the images."""
        return torch.stack(list(self.inner(images, targets).values())).sum()

    def train(self, mode: bool = True) -> Losses:
        """Losses come in training mode only."""
        self.inner.train()
        for module in self.inner.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        return self


def classifier(name: str, weights: Path, args: argparse.Namespace) -> Subject:
    """A network of CIFAR-10 and ``--images`` training images in batches of ``--batch``."""
    from hawq_lightning.data import ImageFolderDataModule

    data = ImageFolderDataModule(args.data, num_classes=10, augment="none", memory=False)
    data.setup("fit")
    dataset = data.train_dataloader().dataset
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0))[: args.images].tolist()
    net = getattr(models, name)(weights=weights).eval()
    batches = [tuple(b) for b in DataLoader(Subset(dataset, order), args.batch)]
    return Subject(name, net, batches, lambda m, b: F.cross_entropy(m(b[0]), b[1]), 0.05)


def detector(args: argparse.Namespace) -> Subject:
    """The RetinaNet of recipes/bccd_retinanet and a few training images in batches of 2."""
    from hawq_lightning.data import CocoData

    data = CocoData(args.bccd, num_classes=3, batch_size=2, num_workers=0, longest=320, hflip=False)
    data.setup("fit")
    torch.manual_seed(0)
    batches = [b for b, _ in zip(data.train_dataloader(), range(args.detector_images // 2))]
    net = models.retinanet_resnet18(3, anchor_size=16)  # smooth L1, which has curvature
    state = torch.load(args.detector, weights_only=True, map_location="cpu")["state_dict"]
    net.load_state_dict({k.removeprefix("net."): v for k, v in state.items() if k.startswith("net.")})
    return Subject(RETINANET, Losses(net).train(), batches, lambda m, b: m(*b), 0.2, probes=4, steps=15)


def subjects(args: argparse.Namespace, wanted: Sequence[str]) -> list[Subject]:
    """Those of the wanted networks whose weights were given, in that order."""
    given = dict(w.split("=", 1) for w in args.weights)
    found = [classifier(n, Path(given[n]), args) for n in wanted if n in given]
    if RETINANET in wanted and args.detector:
        found.append(detector(args))
    if not found:
        raise SystemExit(f"Give --weights of one of: {', '.join(wanted)} (retinanet: --detector and --bccd).")
    return found
