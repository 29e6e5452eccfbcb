"""A network that is called after its dropout is measured as any other; modules of chance are found by their class."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from hawq_lightning import measure
from hawq_lightning.sensitivity import isolated_eval


class Plain(nn.Module):
    """Gives an auxiliary output in training alone, which its loss takes as well."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.a, self.drop, self.head, self.aux = nn.Linear(5, 6), Drop(), nn.Linear(6, 3), nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> Any:
        h = self.drop(self.a(x).relu())
        return (self.head(h), self.aux(h)) if self.training else self.head(h)


class DropPath(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.randint(0, 2, (len(x), 1)) * 2 if self.training else x


class Drop(DropPath):
    """Has a child, and no parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = DropPath()


NAMES = ["DropoutUNet", "UNetWithDropout", "DropPathNet", "StochasticDepthResNet", "DropBlockNet", "SpectralNormGAN"]


def loss_of(model: nn.Module, batch: Any) -> torch.Tensor:
    return sum((F.cross_entropy(y, batch[1]) for y in model(batch[0])), torch.zeros(()))


@pytest.mark.parametrize("name", NAMES)
def test_a_name_takes_nothing_from_the_loss(name):
    batch = torch.randn(8, 5, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 3
    nets = [cls().train() for cls in (Plain, type(name, (Plain,), {}))]
    for net in nets:
        net.drop.__class__ = DropPath
    plain, named = (measure(net, [batch], loss_of, estimator="exact", progress=False) for net in nets)
    assert [(r.name, r.trace) for r in plain] == [(r.name, r.trace) for r in named]
    assert "aux.weight" in [r.name for r in named]


def test_what_drops_is_off_while_its_network_trains():
    net = Plain().train()
    with isolated_eval(net):
        assert net.training and not net.drop.inner.training
    assert net.drop.training and net.drop.inner.training
