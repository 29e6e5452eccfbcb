"""ResNet50 for ImageNet (paper, Table 1a), from torchvision."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from hawq_lightning._extra import require
from hawq_lightning.models._weights import build


def resnet50(num_classes: int = 1000, pretrained: bool = False, weights: str | Path | None = None) -> nn.Module:
    """ResNet50: 54 weight sites, 97.3 MiB of quantizable weights.

    Args:
        num_classes: outputs of the head; downloaded weights have 1000.
        pretrained: download torchvision's ``IMAGENET1K_V1`` weights (76.13% top-1; the paper starts from 77.39%).
        weights: a state dict on disk instead.

    Raises:
        HawqError: torchvision is missing, or the weights cannot be had or do not fit.
    """
    models = require("torchvision.models")
    return build(
        "resnet50",
        lambda download: models.resnet50(
            weights="IMAGENET1K_V1" if download else None, **({} if download else {"num_classes": num_classes})
        ),
        pretrained=pretrained,
        weights=weights,
        source="torchvision" if num_classes == 1000 else None,
        head="fc",
    )
