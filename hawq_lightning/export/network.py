"""The part of a model that an exporter can follow: a detector without its resizing, anchors and suppression."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class DetectorNetwork(nn.Module):
    """Backbone and heads of a torchvision RetinaNet: raw class scores and box offsets of every anchor.

    Args:
        detector: the whole one; its modules are shared, not copied.
    """

    def __init__(self, detector: Any) -> None:
        super().__init__()
        self.backbone = detector.backbone
        self.head = detector.head

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """Normalised images ``[N, 3, H, W]`` to ``cls_logits`` and ``bbox_regression``, ``[N, anchors, ...]``."""
        return self.head(list(self.backbone(images).values()))


def network_of(model: nn.Module) -> nn.Module:
    """The network inside a LightningModule or a detector that maps a batch of images to raw outputs."""
    net = getattr(model, "net", None)
    model = net if isinstance(net, nn.Module) else model
    parts = all(isinstance(getattr(model, name, None), nn.Module) for name in ("backbone", "head", "transform"))
    return DetectorNetwork(model).train(model.training) if parts else model
