"""The networks and images of ``forecast.py`` and ``forecast_ceiling.py``, and how a plan is judged."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Subset

from hawq_lightning import models
from hawq_lightning.data import DigitsDataModule, ImageFolderDataModule
from hawq_lightning.quantization import FloatDistance

NETWORKS = ("resnet20", "squeezenext_cifar", "mobilenet_cifar", "vit_digits")
BATCH = 128
Batches = list[Any]


def loss_fn(model: nn.Module, batch: Any) -> torch.Tensor:
    """The labelled loss."""
    return F.cross_entropy(model(batch[0]), batch[1])


def images_of(args: argparse.Namespace) -> tuple[nn.Module, Batches, Batches]:
    """The trained network, train images for forecasts, held-out images for measurements."""
    if args.network == "vit_digits":
        sys.path.append(str(Path(__file__).resolve().parents[1] / "recipes" / "small_transformers"))
        import nets

        data, net = DigitsDataModule(), nets.Grey()
        models.load_weights(net, args.weights)
    else:
        data = ImageFolderDataModule(args.data, num_classes=10, augment="none", memory=False)
        net = getattr(models, args.network)(weights=args.weights)
    data.setup("fit")

    def draw(dataset: Any) -> Batches:
        most = max(args.images, 2 * args.plan_images)
        order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0))[:most].tolist()
        return list(DataLoader(Subset(dataset, order), BATCH))

    return net.eval(), draw(data.train_dataloader().dataset), draw(data.val_dataloader().dataset)


@torch.no_grad()
def kl(net: nn.Module, batches: Batches, target: FloatDistance) -> float:
    """Mean over images."""
    return sum(float(target(net, b)) * len(b[1]) for b in batches) / sum(len(b[1]) for b in batches)
