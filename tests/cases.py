"""Small networks and losses in float64, and their dense Hessians: the ground truth of the trace tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from hawq_lightning import SiteTable
from hawq_lightning.quantization import quantizable_layers
from hawq_lightning.sensitivity import InputHooks

LossFn = Callable[[nn.Module, Any], torch.Tensor]


class ConvNet(nn.Module):
    """Strided, grouped and dilated convs, eval BatchNorm, in-place ReLU, max-pool, a residual."""

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 3, stride=2, padding=1)
        self.bn = nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)
        self.grouped = nn.Conv2d(4, 4, 3, padding=2, dilation=2, groups=2)
        self.same = nn.Conv2d(4, 4, (1, 3), padding="same", bias=False)
        self.fc = nn.Linear(4, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.relu(self.bn(self.stem(x)))
        x = x + self.relu(self.grouped(x))
        x = F.max_pool2d(x, 2)
        x = self.relu(self.same(x)) + 0.5 * x
        return self.fc(x.mean((2, 3)))


class SharedHead(nn.Module):
    """One head over three levels of a pyramid, and a second head: a detector in miniature."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 3, 3, padding=1)
        self.down = nn.ModuleList(nn.Conv2d(3, 3, 3, stride=2, padding=1) for _ in range(2))
        self.tower = nn.Conv2d(3, 3, 3, padding=1)
        self.score = nn.Conv2d(3, 2, 1)
        self.box = nn.Conv2d(3, 4, 1)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        levels = [F.relu(self.stem(x))]
        for down in self.down:
            levels.append(F.relu(down(levels[-1])))
        towers = [F.relu_(self.tower(level)) for level in levels]
        scores = torch.cat([self.score(t).flatten(2) for t in towers], 2)
        boxes = torch.cat([self.box(t).flatten(2) for t in towers], 2)
        return scores, boxes


class Sequence1d(nn.Module):
    """Conv1d, ConvTranspose1d, a Linear over positions, flatten."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(2, 4, 3, padding=1, padding_mode="circular")
        self.up = nn.ConvTranspose1d(4, 2, 4, stride=2, padding=1, groups=2)
        self.mix = nn.Linear(2, 3)
        self.out = nn.Linear(3 * 8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.leaky_relu(self.conv(x), 0.2)
        x = F.relu(self.up(x))
        x = F.relu(self.mix(x.transpose(1, 2)))
        return self.out(x.flatten(1))


class Volume(nn.Module):
    """Conv3d and ConvTranspose3d."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv3d(1, 2, 2, stride=2)
        self.up = nn.ConvTranspose3d(2, 1, 2, stride=2)
        self.fc = nn.Linear(64, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(F.relu(self.up(F.relu(self.conv(x)))).flatten(1))


class Tied(nn.Module):
    """One weight in two layers, two readers of one tensor, rows that are not images."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)
        self.b = nn.Linear(4, 4)
        self.b.weight = self.a.weight
        self.left = nn.Linear(4, 3)
        self.right = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n, t, d = x.shape
        x = x.reshape(n * t, d)
        x = F.relu(self.a(x)) + F.relu(self.b(x.flip(1)))
        return (self.left(x) + F.relu(self.right(x))).reshape(n, t, 3).mean(1)


def build(kind: type[nn.Module], seed: int = 0) -> nn.Module:
    """A net with BatchNorm statistics that are not trivial, in float64 and evaluation mode."""
    torch.manual_seed(seed)
    net = kind().double().eval()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 2)
    return net


def dense_weight_traces(model: nn.Module, batch: Any, loss_fn: LossFn, table: SiteTable) -> dict[str, float]:
    """Trace of the dense Hessian of every weight site."""
    layers, _ = quantizable_layers(model)
    out = {}
    for site in table.weights:
        weight = layers[site.layers[0]].weight
        loss = loss_fn(model, batch)
        (slope,) = torch.autograd.grad(loss, weight, create_graph=True)
        out[site.name] = _trace([slope], [weight])
    return out


def dense_activation_traces(model: nn.Module, batch: Any, loss_fn: LossFn, table: SiteTable) -> dict[str, float]:
    """Trace of the dense Hessian with respect to the quantized edges: what the layers of a site read."""
    layers, _ = quantizable_layers(model)
    site_of = {x.name: x.activation for x in table.layers if x.activation}
    out = {}
    for site in table.activations:
        shifts: list[torch.Tensor] = []

        def visit(
            name: str, x: torch.Tensor, wanted: str = site.name, into: list[torch.Tensor] = shifts
        ) -> torch.Tensor:
            if name != wanted:
                return x
            into.append(torch.zeros_like(x, requires_grad=True))
            return x + into[-1]

        with InputHooks(layers, site_of, visit):
            loss = loss_fn(model, batch)
        slopes = torch.autograd.grad(loss, shifts, create_graph=True)
        out[site.name] = _trace(list(slopes), shifts)
    return out


def _trace(slopes: list[torch.Tensor], points: list[torch.Tensor]) -> float:
    total = 0.0
    for i, slope in enumerate(slopes):
        if not slope.requires_grad:
            continue
        flat = slope.reshape(-1)
        for j in range(flat.numel()):
            row = torch.autograd.grad(flat[j], points, retain_graph=True, allow_unused=True)[i]
            total += 0.0 if row is None else float(row.reshape(-1)[j])
    return total


def focal(x: torch.Tensor, target: torch.Tensor, gamma: float = 2.0, alpha: float = 0.25) -> torch.Tensor:
    """Sigmoid focal loss (Lin et al., 2017), summed."""
    p = torch.sigmoid(x)
    ce = F.binary_cross_entropy_with_logits(x, target, reduction="none")
    pt = p * target + (1 - p) * (1 - target)
    return ((alpha * target + (1 - alpha) * (1 - target)) * ce * (1 - pt) ** gamma).sum()


def labels(n: int = 4, classes: int = 3) -> torch.Tensor:
    return torch.arange(n) % classes


def image_batch(n: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    return torch.randn(n, 2, 8, 8, generator=g, dtype=torch.float64), labels(n)


def _classes(**kwargs: Any) -> LossFn:
    return lambda m, b: F.cross_entropy(m(b[0]), b[1], **kwargs)


def _on_logits(f: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> LossFn:
    return lambda m, b: f(m(b[0]), F.one_hot(b[1], 3).double())


def _dice(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    p = torch.softmax(x, 1)
    return 1 - 2 * (p * y).sum() / (p.square().sum() + y.sum())


def _detector(m: nn.Module, b: Any) -> torch.Tensor:
    scores, boxes = m(b[0])
    target = (torch.arange(scores.numel()).reshape(scores.shape) % 5 == 0).double()
    positives = target.sum().clamp_min(1)
    return (
        focal(3 * scores, target) / positives
        + F.smooth_l1_loss(boxes, torch.ones_like(boxes) * 0.3, beta=0.5, reduction="sum") / positives
    )


def _inner(m: Any, b: Any) -> torch.Tensor:
    kept = {}
    handle = m.grouped.register_forward_hook(lambda mod, a, out: kept.update(h=out.clone()))
    try:
        out = m(b[0])
    finally:
        handle.remove()
    return F.cross_entropy(out, b[1]) + 0.1 * kept["h"].square().mean()


WEIGHTS = torch.tensor([0.2, 1.0, 3.0], dtype=torch.float64)

# name -> (network, loss, relative tolerance)
CASES: dict[str, tuple[type[nn.Module], LossFn]] = {
    "cross_entropy": (ConvNet, _classes()),
    "label_smoothing": (ConvNet, _classes(label_smoothing=0.2)),
    "sum_reduction": (ConvNet, _classes(reduction="sum")),
    "class_weights": (ConvNet, _classes(weight=WEIGHTS)),
    "ignore_index": (ConvNet, _classes(ignore_index=1)),
    "soft_labels": (ConvNet, lambda m, b: F.cross_entropy(m(b[0]), torch.softmax(F.one_hot(b[1], 3).double(), 1))),
    "mse": (ConvNet, _on_logits(F.mse_loss)),
    "bce": (ConvNet, _on_logits(F.binary_cross_entropy_with_logits)),
    "huber": (ConvNet, _on_logits(lambda x, y: F.huber_loss(x, y, delta=0.3))),
    "smooth_l1": (ConvNet, _on_logits(lambda x, y: F.smooth_l1_loss(x, y, beta=0.7))),
    "focal": (ConvNet, _on_logits(lambda x, y: focal(4 * x, y))),
    "softmax_mse": (ConvNet, _on_logits(lambda x, y: (torch.softmax(x, 1) - y).square().mean())),
    "dice": (ConvNet, _on_logits(_dice)),
    "temperature": (ConvNet, lambda m, b: F.cross_entropy(m(b[0]) / 0.5, b[1])),
    "inner_feature": (ConvNet, _inner),
    "in_place_output": (ConvNet, lambda m, b: F.cross_entropy(m(b[0]).mul_(2.0), b[1])),
    "two_heads_shared_levels": (SharedHead, _detector),
    "one_dimension": (Sequence1d, _classes()),
    "three_dimensions": (Volume, _classes()),
    "tied_and_flattened": (Tied, _classes()),
}  # fmt: skip


def batch_for(kind: type[nn.Module]) -> Any:
    g = torch.Generator().manual_seed(2)
    shape = {Sequence1d: (4, 2, 4), Volume: (4, 1, 4, 4, 4), Tied: (4, 3, 4)}.get(kind)
    if shape is None:
        return image_batch()
    return torch.randn(*shape, generator=g, dtype=torch.float64), labels()
