"""Tables of weights alone: whether the network is piecewise linear is tried at the weights."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import hawq_lightning as hl


class InSeries(nn.Module):
    """One layer twice: piecewise linear in what it reads, and quadratic in its weight."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        return self.layer(F.relu(self.layer(x.mean((2, 3)))))


def chain(*layers):
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))


NETS = {
    "piecewise linear": (lambda: chain(nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.LeakyReLU()), False),
    "grouped": (lambda: chain(nn.Conv2d(4, 4, 3, groups=4), nn.ReLU6()), False),
    "smooth": (lambda: chain(nn.Conv2d(4, 4, 3), nn.SiLU(), nn.Conv2d(4, 4, 3)), True),
    "smooth and grouped": (lambda: chain(nn.Conv2d(4, 4, 3, groups=2), nn.Sigmoid()), True),
    "in series": (InSeries, True),
}


def cross_entropy(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


@pytest.mark.parametrize("name", NETS)
def test_weights_are_tried_where_no_activation_is_measured(name):
    torch.manual_seed(0)
    make, bends = NETS[name]
    net = make().eval()
    batch = (torch.randn(8, 4, 6, 6), torch.randint(0, 3, (8,)))
    table = hl.sites(net)
    assert not table.activations
    notes = " ".join(hl.measure(net, [batch], cross_entropy, sites=table, progress=False, rtol=0.5).notes)
    assert ("not piecewise linear" in notes) == bends, notes
    assert "could not check" not in notes
