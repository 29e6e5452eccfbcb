"""The axis of classes of a head, told by what comes back through the softmax and not by sizes that may agree."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from hawq_lightning.quantization import FloatDistance

N = 6  # images, classes and positions alike


class Maps(nn.Module):
    """A map of numbers an image, ``[N, channels, height, width]``."""

    def __init__(self, channels: int = N) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.head = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.first(x).tanh())


BATCH = torch.randn(N, 2, N, N, generator=torch.Generator().manual_seed(1))
LABELS = torch.randint(0, N, (N, N, N), generator=torch.Generator().manual_seed(2))
WAYS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "moved": lambda y: F.cross_entropy(y, LABELS),
    "joined": lambda y: F.cross_entropy(y.reshape(-1, N), LABELS.flatten()),
    "joined at the end": lambda y: F.cross_entropy(y.flatten(2), LABELS.flatten(1)),
    "tempered": lambda y: F.cross_entropy(y.div(3).clamp(-50, 50).reshape(-1, N), LABELS.flatten(), ignore_index=0),
    "shifted": lambda y: F.cross_entropy(y[:, :, :-1].flatten(2), LABELS[:, :-1].flatten(1)),
    "by hand": lambda y: -(y.softmax(1).add(1e-6).log()[:, 0]).mean(),
    "penalised": lambda y: F.cross_entropy(y, LABELS) + y.logsumexp(1).square().mean() + y.square().mean(),
}
LAST = {"joined", "tempered"}  # of which the last axis holds the classes


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("order", [o for o in itertools.permutations(range(4)) if o[0] == 0 or o[1] == 0])
def test_axes_of_one_size_are_told_apart(way, order):
    net = Maps().eval()

    def loss_of(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        return WAYS[way](model(batch).permute(order))

    target = FloatDistance(net, [BATCH], loss_of)
    axis = order[3 if way in LAST else 1]
    assert [h.axis for h in target.heads] == [axis]
    before = net(BATCH)
    with torch.no_grad():
        net.head.weight.add_(0.2 * torch.randn_like(net.head.weight))
        after = net(BATCH)
        p, q = before.log_softmax(axis), after.log_softmax(axis)
        truth = F.kl_div(q, p, log_target=True, reduction="sum") / (p.numel() / N)
        assert float(target(net, BATCH)) == pytest.approx(float(truth), rel=1e-4)
        same = (before.argmax(axis) == after.argmax(axis)).float().mean()
    if target.classifies:
        assert float(target.agreement(net, BATCH)) == pytest.approx(float(same), abs=1e-6)


def contrasted(y: torch.Tensor) -> torch.Tensor:
    z = F.normalize(y.flatten(1)[:, :N], dim=1)
    return F.cross_entropy(z @ z.roll(1, 0).T / 0.1, torch.arange(N))


def attended(y: torch.Tensor) -> torch.Tensor:
    z = y.flatten(2)[..., :N]
    return ((z @ z.transpose(1, 2)).softmax(-1) @ z).square().mean()


@pytest.mark.parametrize("loss", [contrasted, attended])
def test_embeddings_are_no_classes(loss: Callable[[torch.Tensor], torch.Tensor]):
    def loss_of(model: nn.Module, batch: Any) -> torch.Tensor:
        return loss(model(batch))

    target = FloatDistance(Maps().eval(), [BATCH], loss_of)
    assert [h.distance for h in target.heads] == ["mse"] and not target.classifies
