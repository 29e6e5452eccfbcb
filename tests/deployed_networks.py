"""Small networks of seventeen kinds that people deploy, with their inputs."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn


class Shared(nn.Module):
    """One convolution, called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.conv, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.first(x))
        return self.head(torch.relu(self.conv(torch.relu(self.conv(x)))).mean((2, 3)))


class Tied(nn.Module):
    """Two linear layers with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 4)
        self.b.weight = self.a.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.b(torch.relu(self.a(x)))))


class Recurrent(nn.Module):
    """Steps, then their last output."""

    def __init__(self, kind: type[nn.GRU] | type[nn.LSTM]) -> None:
        super().__init__()
        self.inner, self.head = kind(8, 8, batch_first=True), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.inner(x)[0][:, -1])


class Attention(nn.Module):
    """Self-attention of torch's module."""

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.head = nn.MultiheadAttention(16, 2, batch_first=True), nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.mix(x, x, x, need_weights=False)[0].mean(1))


class Block(nn.Module):
    """Attention, GELU and LayerNorm of a transformer, by functions."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(16), nn.Linear(16, 48), nn.Linear(16, 16)
        self.norm2, self.up, self.down = nn.LayerNorm(16), nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(self.norm(x)).view(len(x), -1, 3, 2, 8).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class NormStays(nn.Module):
    """A BatchNorm in front of its convolution cannot be folded."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.next = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.conv(x))
        return self.next(torch.relu(self.norm(x)) + x).mean((2, 3))


class Upsampled(nn.Module):
    """Coarse features scaled up and added to fine ones."""

    def __init__(self, mode: str) -> None:
        super().__init__()
        self.mode = mode
        self.fine, self.coarse, self.out = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, 2, 1), nn.Conv2d(8, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.fine(x))
        return self.out(x + F.interpolate(torch.relu(self.coarse(x)), scale_factor=2, mode=self.mode))


class Branches(nn.Module):
    """Concatenated branches, one pooled."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 1), nn.Conv2d(8, 6, 3, padding=1)
        self.pooled, self.head = nn.Conv2d(8, 2, 1), nn.Linear(12, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.stem(x))
        x = torch.cat([self.a(x), torch.relu(self.b(x)), self.pooled(F.avg_pool2d(x, 3, 1, 1))], 1)
        return self.head(F.max_pool2d(x, 2).mean((2, 3)))


class Squeeze(nn.Module):
    """Squeeze-and-excitation with hard-swish."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.out = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 1)
        self.down, self.up, self.head = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.hardswish(self.stem(x))
        x = x * F.hardsigmoid(self.up(torch.relu(self.down(F.adaptive_avg_pool2d(x, 1)))))
        return self.head(F.hardswish(self.out(x)).mean((2, 3)))


def _transposed(groups: int) -> nn.Module:
    first, last = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 2, 3)
    return nn.Sequential(first, nn.ReLU(), nn.ConvTranspose2d(8, 8, 2, 2, groups=groups), nn.ReLU(), last)


def _depthwise() -> nn.Module:
    convs = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Conv2d(8, 8, 3, groups=2)
    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)
    return nn.Sequential(convs[0], nn.ReLU6(), convs[1], nn.ReLU6(), convs[2], *head)


def _one_dimension() -> nn.Module:
    return nn.Sequential(nn.Conv1d(3, 8, 3, dilation=2), nn.ReLU(), nn.Conv1d(8, 8, 3), nn.Flatten(), nn.Linear(80, 4))


def _three_dimensions() -> nn.Module:
    convs = nn.Conv3d(2, 4, 3), nn.ReLU(), nn.MaxPool3d(2), nn.Conv3d(4, 4, 1)
    return nn.Sequential(*convs, nn.Flatten(), nn.Linear(32, 4))


def _encoder() -> nn.Module:
    return nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, norm_first=True)


IMAGE, STEPS = (3, 8, 8), (5, 16)
NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "shared_conv": (Shared, IMAGE),
    "tied_linear": (Tied, (16,)),
    "conv_transpose": (lambda: _transposed(1), IMAGE),
    "conv_transpose_groups": (lambda: _transposed(2), IMAGE),
    "depthwise": (_depthwise, IMAGE),
    "gru": (lambda: Recurrent(nn.GRU), (5, 8)),
    "lstm": (lambda: Recurrent(nn.LSTM), (5, 8)),
    "attention": (Attention, STEPS),
    "encoder_layer": (_encoder, STEPS),
    "transformer_block": (Block, STEPS),
    "norm_stays": (NormStays, IMAGE),
    "upsample_nearest": (lambda: Upsampled("nearest"), IMAGE),
    "upsample_bilinear": (lambda: Upsampled("bilinear"), IMAGE),
    "concat_pool": (Branches, IMAGE),
    "squeeze_excite": (Squeeze, IMAGE),
    "conv1d": (_one_dimension, (3, 16)),
    "conv3d": (_three_dimensions, (2, 6, 6, 6)),
}
