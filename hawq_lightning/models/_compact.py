"""Two compact networks for images of 32 pixels: SqueezeNext's blocks, and depthwise-separable convolutions."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from hawq_lightning._errors import HawqError
from hawq_lightning._extra import require
from hawq_lightning.models._weights import build, load_weights

# blocks a stage of SqNxt-23 (Gholami et al. 2018, figure 5)
SQUEEZENEXT_BLOCKS = (6, 6, 8, 1)
# outputs and stride of each pair of convolutions, times width
MOBILENET_PAIRS = ((64, 2), (64, 1), (64, 1), (128, 2), (128, 1), (128, 1), (128, 1), (256, 2), (256, 1))


def squeezenext_cifar(num_classes: int = 10, width: float = 1.0, weights: str | Path | None = None) -> nn.Module:
    """SqNxt-23 for 32 x 32 pixels: pytorchcv's blocks behind a 3x3 convolution of stride 2 and no pooling.

    112 weight sites as at ImageNet's size, 0.56 M of weights and 12.9 M MACs at width 1.

    Args:
        num_classes: outputs.
        width: times the channels of 1.0-SqNxt-23 (32, 64, 128, 256 by stage).
        weights: file with a state dict.

    Raises:
        HawqError: pytorchcv is missing, an impossible width, or weights that cannot be read or do not fit.
    """
    blocks = require("pytorchcv.models.squeezenext")
    convolutions = require("pytorchcv.models.common.conv")
    _check(num_classes, width)
    first, last = int(64 * width), int(128 * width)
    channels = [[int(32 * 2**stage * width)] * count for stage, count in enumerate(SQUEEZENEXT_BLOCKS)]

    def make(_download: bool) -> nn.Module:
        model = blocks.SqueezeNext(channels, first, last, in_size=(32, 32), num_classes=num_classes)
        model.features.init_block = convolutions.conv3x3_block(in_channels=3, out_channels=first, stride=2, bias=True)
        model.features.final_pool = nn.AdaptiveAvgPool2d(1)
        net: nn.Module = model
        return net

    return build("squeezenext_cifar", make, weights=weights, head="output")


class DepthwiseSeparable(nn.Module):
    """A 3x3 convolution of each channel by itself, then a 1x1 one of all; BatchNorm and ReLU behind both.

    Args:
        inputs: channels in.
        outputs: channels out.
        stride: of the first.
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(inputs, inputs, 3, stride, padding=1, groups=inputs, bias=False)
        self.bn1 = nn.BatchNorm2d(inputs)
        self.pointwise = nn.Conv2d(inputs, outputs, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, inputs, H, W]`` to ``[N, outputs, H/stride, W/stride]``."""
        x = self.relu(self.bn1(self.depthwise(x)))
        activated: Tensor = self.relu(self.bn2(self.pointwise(x)))
        return activated


class CifarMobileNet(nn.Module):
    """A 3x3 convolution, nine depthwise-separable pairs, average pooling, one linear layer.

    Args:
        num_classes: outputs.
        width: times the channels (32 first, 256 last).
    """

    def __init__(self, num_classes: int = 10, width: float = 1.0) -> None:
        super().__init__()
        inputs = int(32 * width)
        self.conv = nn.Conv2d(3, inputs, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(inputs)
        self.relu = nn.ReLU(inplace=True)
        pairs = []
        for outputs, stride in MOBILENET_PAIRS:
            pairs.append(DepthwiseSeparable(inputs, int(outputs * width), stride))
            inputs = int(outputs * width)
        self.pairs = nn.Sequential(*pairs)
        self.linear = nn.Linear(inputs, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Images ``[N, 3, H, W]`` to logits ``[N, num_classes]``."""
        x = self.pairs(self.relu(self.bn(self.conv(x))))
        logits: Tensor = self.linear(torch.flatten(nn.functional.adaptive_avg_pool2d(x, 1), 1))
        return logits


def mobilenet_cifar(num_classes: int = 10, width: float = 1.0, weights: str | Path | None = None) -> nn.Module:
    """MobileNet's depthwise-separable pairs (Howard et al. 2017) for 32 x 32 pixels: 20 weight sites.

    0.19 M weights and 8.9 M MACs at width 1.

    Args:
        num_classes: outputs.
        width: times the channels.
        weights: file with a state dict.

    Raises:
        HawqError: an impossible width, or weights that cannot be read or do not fit.
    """
    _check(num_classes, width)
    net = CifarMobileNet(num_classes, width)
    return load_weights(net, weights, head="linear") if weights else net


def _check(num_classes: int, width: float) -> None:
    if num_classes < 1:
        raise HawqError(f"num_classes={num_classes} must be at least 1.")
    if width < 0.25:
        raise HawqError(f"width={width} must be at least 0.25: the narrowest layer has 32 channels at 1.")
