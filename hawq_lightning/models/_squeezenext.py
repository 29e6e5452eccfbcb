"""SqueezeNext for ImageNet (paper, Table 1c), from pytorchcv."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from hawq_lightning._extra import require
from hawq_lightning.models._weights import build


def squeezenext(num_classes: int = 1000, pretrained: bool = False, weights: str | Path | None = None) -> nn.Module:
    """SqueezeNext 2.0-SqNxt-23, the paper's wide one: 2.58 M parameters, 9.72 MiB of quantizable weights.

    Args:
        num_classes: outputs of the head; downloaded weights have 1000.
        pretrained: download pytorchcv's weights.
        weights: a state dict on disk instead.

    Raises:
        HawqError: pytorchcv is missing, or the weights cannot be had or do not fit.
    """
    provider = require("pytorchcv.models.squeezenext")

    def make(download: bool) -> nn.Module:
        model = provider.sqnxt23_w2(pretrained=download, num_classes=num_classes)
        # the fixed 7x7 window averages the whole map at 224 pixels; so does this one, at any size
        model.features.final_pool = nn.AdaptiveAvgPool2d(1)
        net: nn.Module = model
        return net

    return build(
        "squeezenext",
        make,
        pretrained=pretrained,
        weights=weights,
        source="pytorchcv" if num_classes == 1000 else None,
        head="output",
    )
