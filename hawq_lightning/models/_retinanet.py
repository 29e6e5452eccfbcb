"""RetinaNet from torchvision's blocks: the paper's (Table 2), torchvision's own, and a small one for small data."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from hawq_lightning._errors import HawqError
from hawq_lightning._extra import require
from hawq_lightning.models._weights import build

BOX_LOSSES = ("smooth_l1", "l1")
BETA = 1 / 9  # where smooth-L1 turns from a parabola into a line; Detectron's value for RetinaNet


def retinanet_resnet50(
    num_classes: int = 80,
    pretrained: bool = False,
    pretrained_backbone: bool = False,
    weights: str | Path | None = None,
    min_size: int = 800,
    max_size: int = 1333,
    box_loss: str = "smooth_l1",
    frozen_norm: bool = True,
) -> nn.Module:
    """The paper's RetinaNet: ResNet50, level P6 from C5's 2048 channels, 80 classes; 144.6 MiB of weights.

    Labels are 0 to ``num_classes - 1`` without a background class.

    Args:
        num_classes: of the focal loss' sigmoids.
        pretrained: nobody publishes weights for this variant, so this is refused with what to do instead.
        pretrained_backbone: download torchvision's ImageNet ResNet50 (``IMAGENET1K_V1``) for the backbone.
        weights: a state dict of the whole network on disk.
        min_size: images are scaled until their short side has this many pixels...
        max_size: ...unless their long side would exceed this.
        box_loss: ``smooth_l1`` or ``l1``, whose second derivative is 0, so that the box head's traces are 0 as well.
        frozen_norm: BatchNorm as a fixed affine map; false to train from scratch.

    Raises:
        HawqError: torchvision is missing, or the weights cannot be had or do not fit, or ``box_loss`` is unknown.
    """

    def make(download: bool) -> nn.Module:
        return assemble(
            "resnet50", 2048, 256, num_classes, min_size, max_size, box_loss, frozen_norm, pretrained_backbone
        )

    return build("retinanet_resnet50", make, pretrained=pretrained, weights=weights, source=None)


def retinanet_torchvision(
    num_classes: int = 91,
    pretrained: bool = False,
    weights: str | Path | None = None,
    min_size: int = 800,
    max_size: int = 1333,
    box_loss: str = "smooth_l1",
    frozen_norm: bool = True,
) -> nn.Module:
    """The RetinaNet that torchvision publishes weights for: P6 from P5, 91 outputs numbered by COCO's category ids.

    Use ``data.labels=category_id`` with it.

    Args:
        num_classes: of the focal loss' sigmoids; downloaded weights have 91.
        pretrained: download torchvision's ``COCO_V1`` weights (36.4 mAP).
        weights: a state dict on disk instead.
        min_size: short side of the scaled images.
        max_size: bound of their long side.
        box_loss: ``smooth_l1`` or ``l1``, which torchvision trained with.
        frozen_norm: BatchNorm as a fixed affine map.

    Raises:
        HawqError: torchvision is missing, or the weights cannot be had or do not fit, or ``box_loss`` is unknown.
    """

    def make(download: bool) -> nn.Module:
        model = assemble("resnet50", 256, 256, num_classes, min_size, max_size, box_loss, frozen_norm, False)
        for module in model.modules():
            if type(module).__name__ == "FrozenBatchNorm2d":
                module.eps = 0.0  # type: ignore[assignment]  # these weights were trained so
        if download:
            choices = require("torchvision.models.detection").RetinaNet_ResNet50_FPN_Weights
            state = choices.COCO_V1.get_state_dict(progress=True, check_hash=True)
            model.load_state_dict({_newer_name(k): v for k, v in state.items()})
        return model

    return build(
        "retinanet_torchvision",
        make,
        pretrained=pretrained,
        weights=weights,
        source="torchvision" if num_classes == 91 else None,
        rename=_newer_name,
    )


def retinanet_resnet18(
    num_classes: int,
    pretrained: bool = False,
    pretrained_backbone: bool = False,
    weights: str | Path | None = None,
    channels: int = 128,
    min_size: int = 240,
    max_size: int = 320,
    anchor_size: int = 32,
    box_loss: str = "smooth_l1",
    frozen_norm: bool = False,
) -> nn.Module:
    """A small RetinaNet (ResNet18, 128 channels) that trains from scratch on a few hundred images.

    Args:
        num_classes: of the focal loss' sigmoids.
        pretrained: nobody publishes weights for it, so this is refused with what to do instead.
        pretrained_backbone: download torchvision's ImageNet ResNet18 (``IMAGENET1K_V1``) for the backbone.
        weights: a state dict on disk.
        channels: of the pyramid and the heads.
        min_size: short side of the scaled images.
        max_size: bound of their long side.
        anchor_size: side of the smallest anchors in pixels of the scaled image; each level doubles it.
        box_loss: ``smooth_l1`` or ``l1``.
        frozen_norm: BatchNorm as a fixed affine map; only with weights.

    Raises:
        HawqError: torchvision is missing, or the weights cannot be had or do not fit, or ``box_loss`` is unknown.
    """

    def make(download: bool) -> nn.Module:
        model = assemble(
            "resnet18",
            512,
            channels,
            num_classes,
            min_size,
            max_size,
            box_loss,
            frozen_norm,
            pretrained_backbone,
            anchor_size,
        )
        # the usual start (deviation 0.01) hardly lets a signal through the heads' four layers; a short training feels
        # it: after 4 epochs on 96 BCCD images the loss is 0.68 so and 0.82 by the usual start
        for tower in (model.head.classification_head.conv, model.head.regression_head.conv):  # type: ignore[union-attr]
            for block in tower:  # type: ignore[union-attr]
                nn.init.kaiming_normal_(block[0].weight)
        return model

    return build("retinanet_resnet18", make, pretrained=pretrained, weights=weights, source=None)


def assemble(
    body: str,
    p6_channels: int,
    channels: int,
    num_classes: int,
    min_size: int,
    max_size: int,
    box_loss: str,
    frozen_norm: bool,
    pretrained_body: bool,
    anchor_size: int = 32,
) -> nn.Module:
    """Backbone, pyramid from strides 8, 16 and 32 with P6 and P7 on top, and the two heads.

    ``p6_channels`` chooses what P6 is made of: P5 where it equals ``channels``, else C5 (which has that many).
    """
    if box_loss not in BOX_LOSSES:
        raise HawqError(f"box_loss is {box_loss!r}; use one of {', '.join(BOX_LOSSES)}.")
    models = require("torchvision.models")
    detection = require("torchvision.models.detection.retinanet")
    pyramid = require("torchvision.models.detection.backbone_utils").BackboneWithFPN
    ops = require("torchvision.ops")
    norm = ops.FrozenBatchNorm2d if frozen_norm else nn.BatchNorm2d

    trunk: Any = build(
        body,
        lambda download: getattr(models, body)(weights="IMAGENET1K_V1" if download else None, norm_layer=norm),
        pretrained=pretrained_body,
        weights=None,
        source="torchvision",
    )
    stages = {f"layer{i}": str(i - 2) for i in (2, 3, 4)}
    widths = [trunk.inplanes // 8 * 2 ** (i - 1) for i in (2, 3, 4)]
    top = ops.feature_pyramid_network.LastLevelP6P7(p6_channels, channels)
    backbone = pyramid(trunk, stages, widths, channels, extra_blocks=top)

    sizes = [anchor_size * 2**level for level in range(5)]
    anchors = detection.AnchorGenerator(
        tuple(tuple(int(size * 2 ** (third / 3)) for third in range(3)) for size in sizes), ((0.5, 1.0, 2.0),) * 5
    )
    per_place = anchors.num_anchors_per_location()[0]
    head = detection.RetinaNetHead(channels, per_place, num_classes)
    head.regression_head.compute_loss = BoxLoss(head.regression_head.box_coder, 0.0 if box_loss == "l1" else BETA)
    net: nn.Module = detection.RetinaNet(
        backbone, num_classes, min_size=min_size, max_size=max_size, anchor_generator=anchors, head=head
    )
    return net


class BoxLoss:
    """Smooth-L1 on box offsets, averaged over an image's matched anchors, then over images; L1 where ``beta`` is 0."""

    def __init__(self, coder: object, beta: float) -> None:
        self.coder = coder
        self.beta = beta

    def __call__(
        self,
        targets: Sequence[dict[str, torch.Tensor]],
        head_outputs: dict[str, torch.Tensor],
        anchors: Sequence[torch.Tensor],
        matched_idxs: Sequence[torch.Tensor],
    ) -> torch.Tensor:
        """Return the loss; ``matched_idxs`` holds the index of each anchor's box, or a negative number."""
        total = head_outputs["bbox_regression"].sum() * 0.0
        for target, offsets, places, matched in zip(targets, head_outputs["bbox_regression"], anchors, matched_idxs):
            positive = torch.where(matched >= 0)[0]
            encoded = self.coder.encode_single(target["boxes"][matched[positive]], places[positive])  # type: ignore[attr-defined]
            distance = F.smooth_l1_loss(offsets[positive], encoded, reduction="sum", beta=self.beta)
            total = total + distance / max(1, len(positive))
        return total / max(1, len(targets))


def _newer_name(name: str) -> str:
    """Torchvision's older files name a head's convolutions without the block that now holds them."""
    return re.sub(r"^(head\.\w+_head\.conv\.\d)\.(weight|bias)$", r"\1.0.\2", name)
