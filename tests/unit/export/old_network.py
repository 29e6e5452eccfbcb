"""The network of the files in ``files/``, which release 0.1.0 wrote."""

import torch
from torch import nn


class Small(nn.Module):
    """A convolution with BatchNorm, a transposed one, a tied embedding, and a buffer of booleans."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, bias=False)
        self.bn = nn.BatchNorm2d(4)
        self.up = nn.ConvTranspose2d(4, 3, 2)
        self.embed = nn.Embedding(5, 3)
        self.head = nn.Linear(3, 5)
        self.head.weight = self.embed.weight
        self.register_buffer("flags", torch.tensor([True, False]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.bn(self.conv(x)))
        x = torch.relu(self.up(x)).mean((2, 3))
        return self.head(x + self.embed(torch.tensor([3])))


def images() -> torch.Tensor:
    """What the stored outputs are of."""
    return torch.linspace(-2, 2, 2 * 2 * 6 * 6).reshape(2, 2, 6, 6).sin()
