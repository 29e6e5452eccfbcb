"""A small network of unusual layers, a batch for it, and a plan."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

import hawq_lightning as hl


class Small(nn.Module):
    """A layer in a ModuleDict, a padding mode, a grouped transposed convolution, a Linear on 4-D input."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.ModuleDict(
            {
                "conv": nn.Conv2d(3, 8, 3, padding=1, padding_mode="reflect"),
                "up": nn.ConvTranspose2d(8, 4, 2, stride=2, groups=2, output_padding=1),
            }
        )
        self.rows = nn.Linear(17, 6)
        self.head = nn.Linear(6, 4)

    def forward(self, x):
        x = F.relu(self.body["up"](F.relu(self.body["conv"](x))))
        return self.head(F.relu(self.rows(x).mean((1, 2))))


def images(dtype=torch.float32, count=8):
    g = torch.Generator().manual_seed(0)
    return torch.randn(count, 3, 8, 8, generator=g).to(dtype), torch.randint(0, 4, (count,), generator=g)


def cross_entropy(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def small_plan(model, dtype=torch.float32, loss_fn=cross_entropy, batch=None, forward=None, weight_bits=(2, 4, 8)):
    batch = images(dtype) if batch is None else batch
    table = hl.sites(model, batch, **({} if forward is None else {"forward": forward}))
    traces = hl.measure(model, [batch], loss_fn, sites=table, progress=False, max_probes=4, rtol=0.5)
    choices = hl.candidates(
        model, [batch], traces, table, loss_fn, weight_bits=weight_bits, activation_bits=(4, 8), input_bits=None
    )
    return hl.select(hl.Problem(table, choices, traces), {"weights": "6x", "act": "5x"})


@dataclass
class Batch:
    """As collate functions make them."""

    image: torch.Tensor
    label: torch.Tensor
