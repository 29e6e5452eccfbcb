"""Transfer hooks that draw random numbers or move statistics: training after measuring is training without it."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningDataModule
from torch import nn

from tests.trainers import FEATURES, Classifier, loader, measuring, same_states, trainer


class Chance(Classifier):
    """Augments in the hook that its argument names, by chance or by a BatchNorm; its own centre is named anew."""

    def __init__(self, where, what):
        super().__init__()
        self.where, self.what, self.norm, self.calls = where, what, nn.BatchNorm1d(FEATURES, affine=False), 0
        self.register_buffer("centre", torch.zeros(FEATURES))

    def augmented(self, where, batch):
        if self.where != where:
            return batch
        self.calls += 1
        x, y = batch
        if self.what == "statistics":
            self.centre = 0.9 * self.centre + 0.1 * x.mean(0)
            return [self.norm(x) - self.centre, y]
        noise = {"torch": lambda: torch.randn(()), "numpy": lambda: np.random.rand(), "python": lambda: random.random()}
        return [x + 0.1 * float(noise[self.what]()), y]


class Augmenting(Chance):
    def on_before_batch_transfer(self, batch, dataloader_idx):
        return self.augmented("before", batch)

    def on_after_batch_transfer(self, batch, dataloader_idx):
        return self.augmented("after", batch)


class Moving(Augmenting):
    def transfer_batch_to_device(self, batch, device, dataloader_idx):
        return self.augmented("transfer", super().transfer_batch_to_device(batch, device, dataloader_idx))


class MovingAlone(Chance):
    def transfer_batch_to_device(self, batch, device, dataloader_idx):
        return self.augmented("transfer", super().transfer_batch_to_device(batch, device, dataloader_idx))


class NoisyData(LightningDataModule):
    def train_dataloader(self):
        return loader()

    def on_after_batch_transfer(self, batch, dataloader_idx):
        return [batch[0] + 0.1 * torch.randn_like(batch[0]), batch[1]]


def both(folder, make, data):
    states = []
    for name in ("alone", "beside"):
        for seed in (torch.manual_seed, np.random.seed, random.seed):
            seed(3)
        model = make()
        trainer(folder / name, *([measuring()] if name == "beside" else []), max_epochs=2).fit(model, data())
        states.append((model.state_dict(), random.random(), np.random.rand(), torch.rand(()), model))
    assert same_states(states[0][0], states[1][0])
    assert [float(x) for x in states[0][1:4]] == [float(x) for x in states[1][1:4]]
    return states[0][4], states[1][4]


@pytest.mark.parametrize("what", ["torch", "numpy", "python", "statistics"])
@pytest.mark.parametrize("kind", ["before", "after", "transfer", "transfer alone"])
def test_hooks_of_the_module_leave_no_trace(tmp_path, kind, what):
    classes = {"transfer": Moving, "transfer alone": MovingAlone}
    alone, beside = both(tmp_path, lambda: classes.get(kind, Augmenting)(kind.split()[0], what), loader)
    assert alone.calls == beside.calls > 0


def test_hooks_of_the_data_leave_no_trace(tmp_path):
    both(tmp_path, Classifier, NoisyData)
