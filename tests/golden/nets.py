"""Networks and data of the golden runs; everything is drawn here, so that other tests can change."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

CLASSES = 4


class Residual(nn.Module):
    """Strided, grouped and dilated convolutions, BatchNorm, a residual, max-pool: piecewise linear."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace=True)
        self.grouped = nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=2)
        self.narrow = nn.Conv2d(8, 12, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(12)
        self.fc = nn.Linear(12, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.relu(self.bn1(self.stem(x)))
        x = x + self.relu(self.grouped(x))
        x = F.max_pool2d(x, 2)
        return self.fc(self.relu(self.bn2(self.narrow(x))).mean((2, 3)))


class Smooth(nn.Module):
    """SiLU and squeeze-and-excitation: curved between its layers, so that Gauss-Newton alone misses something."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, stride=2, padding=1)
        self.squeeze = nn.Conv2d(6, 3, 1)
        self.excite = nn.Conv2d(3, 6, 1)
        self.depthwise = nn.Conv2d(6, 6, 3, padding=1, groups=6)
        self.fc = nn.Linear(6, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.silu(self.stem(x))
        gate = torch.sigmoid(self.excite(F.silu(self.squeeze(x.mean((2, 3), keepdim=True)))))
        return self.fc(F.silu(self.depthwise(x * gate)).mean((2, 3)))


class Transposed(nn.Module):
    """Transposed and grouped convolutions in one and three dimensions, a Linear over positions."""

    def __init__(self) -> None:
        super().__init__()
        self.volume = nn.Conv3d(1, 4, (1, 2, 2), stride=(1, 2, 2))
        self.up3 = nn.ConvTranspose3d(4, 2, (1, 2, 2), stride=(1, 2, 2), groups=2)
        self.conv = nn.Conv1d(6, 4, 3, padding=1, stride=4, padding_mode="circular")
        self.up = nn.ConvTranspose1d(4, 6, 4, stride=2, padding=1, groups=2)
        self.mix = nn.Linear(6, 5)
        self.out = nn.Linear(5, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.up3(F.relu(self.volume(x[:, None]))))  # [N, 2, 3, 8, 8]
        x = F.leaky_relu(self.conv(x.flatten(1, 2).flatten(2)), 0.2)
        x = F.relu(self.mix(F.relu(self.up(x)).transpose(1, 2)))
        return self.out(x.mean(1))


class Tied(nn.Module):
    """One weight in two layers, one layer called three times, two readers of one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, stride=2, padding=1)
        self.again = nn.Conv2d(6, 6, 3, padding=1)
        self.a = nn.Linear(6, 6)
        self.b = nn.Linear(6, 6)
        self.b.weight = self.a.weight
        self.left = nn.Linear(6, CLASSES)
        self.right = nn.Linear(6, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.stem(x))
        for _ in range(3):
            x = F.relu(self.again(x))
        x = x.flatten(2).transpose(1, 2)
        x = F.relu(self.a(x)) + F.relu(self.b(x.flip(1)))
        return (self.left(x) + F.relu(self.right(x))).mean(1)


class TwoHeads(nn.Module):
    """A tower over two levels of a pyramid; the box head ends in an L1 loss, which has no curvature."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.down = nn.Conv2d(6, 6, 3, stride=2, padding=1)
        self.tower = nn.Conv2d(6, 6, 3, padding=1)
        self.score = nn.Conv2d(6, CLASSES, 1)
        self.box = nn.Conv2d(6, 4, 1)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        first = F.relu(self.stem(x))
        towers = [F.relu(self.tower(level)) for level in (first, F.relu(self.down(first)))]
        scores, boxes = (torch.cat([head(t).flatten(2) for t in towers], 2) for head in (self.score, self.box))
        return scores, boxes


class Dropped(nn.Sequential):
    """A small perceptron with BatchNorm and dropout, whose random draws a resumed training has to repeat."""

    def __init__(self) -> None:
        super().__init__(
            nn.Flatten(), nn.Linear(192, 16), nn.BatchNorm1d(16), nn.ReLU(inplace=True), nn.Dropout(0.2),
            nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, CLASSES),
        )  # fmt: skip


class Plain(nn.Sequential):
    """A perceptron without BatchNorm and dropout, of which each process would have its own."""

    def __init__(self) -> None:
        super().__init__(
            nn.Flatten(), nn.Linear(192, 16), nn.ReLU(), nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, CLASSES)
        )


def build(kind: type[nn.Module], seed: int = 0, trained: bool = True) -> nn.Module:
    """A network with BatchNorm statistics that are not trivial, in evaluation mode."""
    torch.manual_seed(seed)
    net = kind().eval()
    for module in net.modules() if trained else ():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            nn.init.normal_(module.running_mean, 0, 0.3)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
    return net


def images(count: int, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Noisy pictures of four kinds, 3x8x8."""
    centres = torch.randn(CLASSES, 3, 8, 8, generator=torch.Generator().manual_seed(99))
    g = torch.Generator().manual_seed(seed)
    y = torch.randint(0, CLASSES, (count,), generator=g)
    return centres[y] + 0.7 * torch.randn(count, 3, 8, 8, generator=g), y


def batches(count: int, size: int, seed: int = 1) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Images in batches."""
    x, y = images(count, seed)
    return list(zip(x.split(size), y.split(size)))


def loader(count: int = 64, size: int = 16, seed: int = 1, shuffle: bool = True) -> DataLoader:
    """A loader as users write it."""
    return DataLoader(TensorDataset(*images(count, seed)), size, shuffle=shuffle)


def cross_entropy(model: nn.Module, batch: Any) -> torch.Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def two_losses(model: nn.Module, batch: Any) -> torch.Tensor:
    """Classification by cross entropy, boxes by L1."""
    scores, boxes = model(batch[0])
    target = batch[1][:, None].expand(-1, scores.shape[2])
    return F.cross_entropy(scores, target) + F.l1_loss(boxes, torch.full_like(boxes, 0.3))


class Learner(LightningModule):
    """Trains a network by SGD."""

    def __init__(self, net: nn.Module, lr: float = 0.02) -> None:
        super().__init__()
        self.net, self.lr = net, lr

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        logits = self(batch[0])
        self.log("val_loss", F.cross_entropy(logits, batch[1]))
        self.log("val_acc", (logits.argmax(1) == batch[1]).float().mean())

    test_step = validation_step

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)
