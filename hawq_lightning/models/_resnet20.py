"""ResNets of depth 6n+2 for small images (He et al. 2016, section 4.2), with option A shortcuts."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hawq_lightning._errors import HawqError
from hawq_lightning.models._weights import load_weights


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut without parameters: a strided slice, padded with zero channels.

    Args:
        inputs: channels in.
        outputs: channels out.
        stride: of the first convolution and of the slice.
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.stride = stride
        self.widen = outputs - inputs

    def forward(self, x: Tensor) -> Tensor:
        """``[N, inputs, H, W]`` to ``[N, outputs, H/stride, W/stride]``."""
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.stride != 1 or self.widen:
            before = self.widen // 2
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, before, self.widen - before))
        out += x
        activated: Tensor = self.relu(out)
        return activated


class CifarResNet(nn.Module):
    """Three stages of ``blocks`` basic blocks, widths ``channels`` x (1, 2, 4), average pooling, one linear layer.

    Args:
        blocks: n blocks a stage; the depth is 6n + 2.
        num_classes: outputs.
        channels: width of the first stage.
        in_channels: 3 for colour, 1 for grey images.
    """

    def __init__(self, blocks: int = 3, num_classes: int = 10, channels: int = 16, in_channels: int = 3) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = _stage(channels, channels, 1, blocks)
        self.layer2 = _stage(channels, 2 * channels, 2, blocks)
        self.layer3 = _stage(2 * channels, 4 * channels, 2, blocks)
        self.linear = nn.Linear(4 * channels, num_classes)
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Images ``[N, in_channels, H, W]`` to logits ``[N, num_classes]``."""
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        logits: Tensor = self.linear(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))
        return logits


def resnet20(
    num_classes: int = 10,
    channels: int = 16,
    in_channels: int = 3,
    depth: int = 20,
    weights: str | Path | None = None,
) -> CifarResNet:
    """ResNet20, or another depth 6n+2 of the same family.

    Args:
        num_classes: outputs.
        channels: width of the first stage; 16 in the paper.
        in_channels: 3 for colour, 1 for grey images such as the digits.
        depth: 6n + 2: 8, 14, 20, 32, 44, 56...
        weights: file with a state dict (keys ``conv1, bn1, layerN.M.convK, linear``).

    Raises:
        HawqError: impossible depth or width, or weights that cannot be read or do not fit.
    """
    if depth < 8 or (depth - 2) % 6:
        close = max(8, 6 * round((depth - 2) / 6) + 2)
        raise HawqError(f"depth={depth} is no ResNet of this family (6n + 2); the nearest is {close}.")
    for name, value in (("num_classes", num_classes), ("channels", channels), ("in_channels", in_channels)):
        if value < 1:
            raise HawqError(f"{name}={value} must be at least 1.")
    net = CifarResNet((depth - 2) // 6, num_classes, channels, in_channels)
    return load_weights(net, weights, head="linear") if weights else net  # type: ignore[return-value]


def _stage(inputs: int, outputs: int, stride: int, blocks: int) -> nn.Sequential:
    first = BasicBlock(inputs, outputs, stride)
    return nn.Sequential(first, *(BasicBlock(outputs, outputs, 1) for _ in range(blocks - 1)))
