"""The commonest misuse is told: traces of a network that has not been trained."""

from __future__ import annotations

import warnings

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from hawq_lightning import HAWQ, MeasureConfig
from hawq_lightning.quantization import enabled_bits


class Net(pl.LightningModule):
    def __init__(self, loss):
        super().__init__()
        self.loss = loss
        self.net = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 3))

    def training_step(self, batch):
        x, y = batch
        return self.loss(self.net(x), y)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.01)


def told(tmp_path, loss, y, epochs):
    torch.manual_seed(0)
    net = Net(loss)
    x = torch.randn(256, 6, generator=torch.Generator().manual_seed(1))
    loader = DataLoader(TensorDataset(x, y(x)), 32, shuffle=True)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False,
             "enable_model_summary": False, "default_root_dir": tmp_path}  # fmt: skip
    if epochs:
        pl.Trainer(max_epochs=epochs, **quiet).fit(net, loader)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        hawq = HAWQ((2, 4, 8), 8, "10x", measure=MeasureConfig(images=256), progress=False)
        pl.Trainer(max_epochs=1, limit_train_batches=1, callbacks=[hawq], **quiet).fit(net, loader)
    assert len({b for n, b in enabled_bits(net).items() if n.endswith("weight")}) >= 2
    return " ".join(str(w.message) for w in seen)


@pytest.mark.parametrize(("epochs", "warned"), [(0, True), (30, False)])
def test_a_loss_near_chance(tmp_path, epochs, warned):
    text = told(tmp_path, F.cross_entropy, lambda x: x[:, :3].argmax(1), epochs)
    assert ("looks untrained" in text) == warned


@pytest.mark.parametrize(("epochs", "warned"), [(3, True), (40, False)])
def test_a_gradient_that_outweighs_the_curvature(tmp_path, epochs, warned):
    text = told(tmp_path, F.mse_loss, lambda x: 10 + 20 * x[:, :3], epochs)
    assert ("outweighs" in text) == warned
