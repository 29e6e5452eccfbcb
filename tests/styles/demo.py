"""As Lightning's own demos: one file, an autoencoder with encoder and decoder, the Trainer at the bottom."""

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, random_split


class LitAutoEncoder(LightningModule):
    """Reconstructs 8x8 pictures through a bottleneck."""

    def __init__(self, hidden_dim: int = 24, learning_rate: float = 1e-3):
        super().__init__()
        self.save_hyperparameters()
        self.encoder = nn.Sequential(nn.Linear(64, hidden_dim), nn.ReLU(), nn.Linear(hidden_dim, 6))
        self.decoder = nn.Sequential(nn.Linear(6, hidden_dim), nn.ReLU(), nn.Linear(hidden_dim, 64))

    def forward(self, x):
        return self.decoder(self.encoder(x.view(x.size(0), -1)))

    def training_step(self, batch, batch_idx):
        return self._step(batch, "train")

    def validation_step(self, batch, batch_idx):
        self._step(batch, "val")

    def test_step(self, batch, batch_idx):
        self._step(batch, "test")

    def predict_step(self, batch, batch_idx, dataloader_idx=None):
        return self(batch[0])

    def _step(self, batch, stage):
        x = batch[0].view(batch[0].size(0), -1)
        loss = F.mse_loss(self(x), x)
        self.log(f"{stage}_loss", loss, on_step=stage == "train", prog_bar=True)
        return loss

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=self.hparams.learning_rate)


class Pictures(LightningDataModule):
    """Smooth random pictures, split in three."""

    def __init__(self, batch_size: int = 16):
        super().__init__()
        g = torch.Generator().manual_seed(0)
        rows = F.interpolate(torch.rand(96, 1, 3, 3, generator=g), size=8, mode="bilinear")
        self.train_set, self.val_set, self.test_set = random_split(
            TensorDataset(rows), [64, 16, 16], torch.Generator().manual_seed(1)
        )
        self.batch_size = batch_size

    def train_dataloader(self):
        return DataLoader(self.train_set, batch_size=self.batch_size, shuffle=True)

    def val_dataloader(self):
        return DataLoader(self.val_set, batch_size=self.batch_size)

    def test_dataloader(self):
        return DataLoader(self.test_set, batch_size=self.batch_size)

    predict_dataloader = test_dataloader


def main(callbacks, **trainer):
    """What the demo's command line does."""
    model, data = LitAutoEncoder(), Pictures()
    t = Trainer(max_epochs=2, callbacks=callbacks, **trainer)
    t.fit(model, datamodule=data)
    t.test(model, datamodule=data, verbose=False)
    predictions = t.predict(model, datamodule=data)
    assert predictions[0].shape == (16, 64)
    return model
