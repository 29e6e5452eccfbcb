"""Settings of the Trainer and kinds of train data, each on an armed network with unequal bits."""

import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.callbacks import Callback
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from hawq_lightning.quantization import armed_bits

from .trainers import Classifier, assert_mixed, blobs, hawq, loader, trainer


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


class Seen(Callback):
    """Bits at every batch, by hook."""

    def __init__(self):
        self.train, self.val = [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.train.append(armed_bits(pl_module))

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        self.val.append(armed_bits(pl_module))


def run(folder, model, data, val=None, callback=None, **settings):
    """Fit; every batch of training and validation saw the armed network."""
    callback, seen = callback or hawq(), Seen()
    t = trainer(folder, callback, seen, **({"max_epochs": 2} | settings))
    t.fit(model, data, val)
    assert_mixed(model, callback)
    wanted = armed_bits(model)
    assert seen.train and all(bits == wanted for bits in seen.train + seen.val)
    return t, seen


@pytest.mark.feature("Settings", "`limit_train_batches`, `limit_val_batches`, `val_check_interval`", "works")
def test_limits(tmp_path):
    limits = {"limit_train_batches": 3, "limit_val_batches": 1, "val_check_interval": 1}
    _, seen = run(tmp_path, Classifier(), loader(), loader(shuffle=False), **limits)
    assert (len(seen.train), len(seen.val)) == (6, 6)


class Images(LightningModule):
    """A convolutional network whose user keeps channels last."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 12, 3, stride=2), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 4),
        )  # fmt: skip
        self.layouts = []

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        x, y = batch
        x = x.to(memory_format=torch.channels_last)
        self.layouts.append(self.net[0](x).is_contiguous(memory_format=torch.channels_last))
        return F.cross_entropy(self(x), y)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), 1e-3)


@pytest.mark.feature("Settings", "`memory_format=torch.channels_last`", "works; the layout stays")
def test_channels_last(tmp_path):
    model = Images().to(memory_format=torch.channels_last)
    data = DataLoader(TensorDataset(torch.randn(32, 3, 8, 8), torch.randint(0, 4, (32,))), 16)
    run(tmp_path, model, data, max_epochs=1)
    assert model.layouts and all(model.layouts)
    assert model.net[3].weight.is_contiguous(memory_format=torch.channels_last)


class Module(LightningDataModule):
    """Data as a DataModule, made in ``setup``."""

    def setup(self, stage):
        self.rows = blobs()

    def train_dataloader(self):
        return DataLoader(self.rows, 16, shuffle=True)

    def val_dataloader(self):
        return DataLoader(self.rows, 16)
