"""A small network of all kinds of layers that differ on a GPU, its data, and the way from traces to a plan."""

from __future__ import annotations

import torch
from lightning.pytorch import LightningModule
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import hawq_lightning as hl

CLASSES, SIZE = 5, 12


class Net(nn.Module):
    """Convolutions (plain, grouped, transposed), BatchNorm, a linear layer, attention by hand."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.depth = nn.Conv2d(8, 8, 3, groups=8)
        self.up = nn.ConvTranspose2d(8, 6, 2, stride=2)
        self.q, self.k, self.v = (nn.Linear(6, 6) for _ in range(3))
        self.head = nn.Linear(6, CLASSES)

    def forward(self, x):
        x = self.norm(self.stem(x)).relu()
        x = F.avg_pool2d(self.up(self.depth(x).relu()).relu(), 5).flatten(2).transpose(1, 2)
        x = x + (self.q(x) @ self.k(x).transpose(1, 2)).softmax(-1) @ self.v(x)
        return self.head(x.mean(1))


def images(count=32, seed=0):
    g = torch.Generator().manual_seed(seed)
    y = torch.randint(0, CLASSES, (count,), generator=g)
    x = torch.randn(CLASSES, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(9))[y]
    return x + 0.5 * torch.randn(count, 3, SIZE, SIZE, generator=g), y


def batches(device="cpu", size=8, count=32):
    x, y = (t.to(device) for t in images(count))
    return list(zip(x.split(size), y.split(size)))


def loss_fn(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def trained(steps=20):
    """The same on every machine's CPU."""
    torch.manual_seed(0)
    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), 0.05, momentum=0.9)
    for i in range(steps):
        optimizer.zero_grad()
        loss_fn(net, batches()[i % 4]).backward()
        optimizer.step()
    return net.eval()


def measured(net, data, loss=loss_fn, **settings):
    """Traces, candidates and the plan at 8x."""
    table = hl.sites(net, data[0])
    traces = hl.measure(net, data, loss, sites=table, progress=False, rtol=0.2, **settings)
    choices = hl.candidates(net, data, traces, table, loss)
    return traces, hl.select(hl.Problem(table, choices, traces), "8x")


class Task(LightningModule):
    """The network as a user trains it."""

    def __init__(self, net=None, channels_last=False):
        super().__init__()
        self.net = net or trained()
        self.form = torch.channels_last if channels_last else torch.contiguous_format

    def forward(self, x):
        return self.net(x.to(memory_format=self.form))

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.01, momentum=0.9)


def loader(**settings):
    return DataLoader(TensorDataset(*images()), 8, **settings)


QUIET = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}


def accelerator(device):
    """Of the Trainer."""
    return {"accelerator": "gpu" if device == "cuda" else "cpu", "devices": 1, **QUIET}


def hawq(**settings):
    return hl.HAWQ(weight_bits=(2, 4, 8), activation_bits=8, budget="8x", progress=False, **settings)
