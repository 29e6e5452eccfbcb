"""Lightning's own demo modules, with the one added callback."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.demos.boring_classes import BoringModel, DemoModel, ManualOptimBoringModel, RandomDataset
from lightning.pytorch.demos.boring_classes import Net as DemoNet
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from hawq_lightning import HawqError
from hawq_lightning.quantization import enabled_bits
from tests.trainers import (
    fit,
    hawq,
    trainer,
    weight_widths,
)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)


class BoringDeep(BoringModel):
    def __init__(self):
        super().__init__()
        self.layer = nn.Sequential(nn.Linear(32, 24), nn.ReLU(), nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 2))


class ManualDeep(ManualOptimBoringModel):
    def __init__(self):
        super().__init__()
        self.layer = BoringDeep().layer


@pytest.mark.feature("Modules", "Lightning's BoringModel and its manual twin, with some depth", "works")
@pytest.mark.parametrize("kind", [BoringDeep, ManualDeep])
def test_boring_models_with_some_depth(tmp_path, kind):
    fit(tmp_path, kind(), DataLoader(RandomDataset(32, 32), 8))


def test_one_layer_gets_one_width(tmp_path):
    model, callback = BoringModel(), hawq(budget="8x")
    trainer(tmp_path, callback).fit(model, DataLoader(RandomDataset(32, 32), 8))
    assert weight_widths(model) == {4}  # a single layer cannot be mixed
    assert callback.plan["layer.weight"].bits == 4


def test_a_loss_without_curvature_is_refused(tmp_path):
    model = DemoModel()
    with pytest.raises(HawqError, match="no curvature"):
        trainer(tmp_path, hawq()).fit(model, DataLoader(RandomDataset(32, 32), 8))
    assert not enabled_bits(model)


class MnistStyle(LightningModule):
    """Lightning's convolutional demo network, log-softmax and nll_loss."""

    def __init__(self):
        super().__init__()
        self.net = DemoNet()
        self.net.fc1 = nn.Linear(64 * 4, 16)
        self.net.fc2 = nn.Linear(16, 10)

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.nll_loss(self.net(x), y)

    def configure_optimizers(self):
        return torch.optim.Adadelta(self.parameters(), lr=0.1)


@pytest.mark.feature("Modules", "Lightning's convolutional demo network", "works")
def test_demo_conv_net(tmp_path):
    data = TensorDataset(torch.rand(16, 1, 8, 8), torch.randint(0, 10, (16,)))
    fit(tmp_path, MnistStyle(), DataLoader(data, 8), rtol=1.0, images=16)
