"""As in configuration-driven templates: the network and the optimizers are handed in, metrics are modules."""

from functools import partial
from inspect import signature
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MaxMetric, MeanMetric
from torchmetrics.classification.accuracy import Accuracy


class DenseNet(nn.Module):
    """A plain network with normalisation."""

    def __init__(self, input_size: int = 20, sizes: tuple[int, ...] = (24, 16), output_size: int = 5) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for n in sizes:
            layers += [nn.Linear(input_size, n), nn.BatchNorm1d(n), nn.ReLU()]
            input_size = n
        self.model = nn.Sequential(*layers, nn.Linear(input_size, output_size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model(x.flatten(1))


class ClassificationModule(LightningModule):
    """Holds what it is given; nothing is built here."""

    def __init__(self, net: nn.Module, optimizer: Any, scheduler: Any, compile: bool = False) -> None:
        super().__init__()
        self.save_hyperparameters(logger=False, ignore=["net"])
        self.net = net
        self.criterion = nn.CrossEntropyLoss()
        self.train_acc = Accuracy(task="multiclass", num_classes=5)
        self.val_acc = Accuracy(task="multiclass", num_classes=5)
        self.train_loss, self.val_loss = MeanMetric(), MeanMetric()
        self.val_acc_best = MaxMetric()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)

    def on_train_start(self) -> None:
        self.val_loss.reset()
        self.val_acc.reset()
        self.val_acc_best.reset()

    def model_step(self, batch):
        x, y = batch
        logits = self.forward(x)
        return self.criterion(logits, y), torch.argmax(logits, dim=1), y

    def training_step(self, batch, batch_idx: int) -> torch.Tensor:
        loss, preds, targets = self.model_step(batch)
        self.train_loss(loss)
        self.train_acc(preds, targets)
        self.log("train/loss", self.train_loss, on_step=False, on_epoch=True, prog_bar=True)
        self.log("train/acc", self.train_acc, on_step=False, on_epoch=True, prog_bar=True)
        return loss

    def validation_step(self, batch, batch_idx: int) -> None:
        loss, preds, targets = self.model_step(batch)
        self.val_loss(loss)
        self.val_acc(preds, targets)
        self.log("val/loss", self.val_loss, on_step=False, on_epoch=True, prog_bar=True)
        self.log("val/acc", self.val_acc, on_step=False, on_epoch=True, prog_bar=True)

    def on_validation_epoch_end(self) -> None:
        self.val_acc_best(self.val_acc.compute())
        self.log("val/acc_best", self.val_acc_best.compute(), sync_dist=True, prog_bar=True)

    def setup(self, stage: str) -> None:
        if self.hparams.compile and stage == "fit":
            self.net = torch.compile(self.net, backend="eager")

    def configure_optimizers(self):
        optimizer = self.hparams.optimizer(params=self.trainer.model.parameters())
        if self.hparams.scheduler is None:
            return {"optimizer": optimizer}
        schedule = {"scheduler": self.hparams.scheduler(optimizer=optimizer), "monitor": "val/loss"}
        return {"optimizer": optimizer, "lr_scheduler": schedule | {"interval": "epoch", "frequency": 1}}


class VectorsDataModule(LightningDataModule):
    """Labelled vectors, made in ``setup``."""

    def __init__(self, batch_size: int = 16, num_workers: int = 0, pin_memory: bool = False) -> None:
        super().__init__()
        self.save_hyperparameters(logger=False)
        self.data_train = self.data_val = None

    def setup(self, stage: str | None = None) -> None:
        if self.data_train is None:
            g = torch.Generator().manual_seed(0)
            x = torch.randn(80, 4, 5, generator=g)
            y = (x.flatten(1) @ torch.randn(20, 5, generator=g)).argmax(1)
            self.data_train, self.data_val = TensorDataset(x[:64], y[:64]), TensorDataset(x[64:], y[64:])

    def train_dataloader(self):
        return DataLoader(self.data_train, batch_size=self.hparams.batch_size, shuffle=True)

    def val_dataloader(self):
        return DataLoader(self.data_val, batch_size=self.hparams.batch_size)


def main(callbacks, compile=False, **trainer):
    """What the template's ``train.py`` does with its instantiated configuration."""
    model = ClassificationModule(
        DenseNet(),
        optimizer=partial(torch.optim.Adam, lr=0.01),
        scheduler=partial(torch.optim.lr_scheduler.ReduceLROnPlateau, mode="min", patience=1),
        compile=compile,
    )
    folder = trainer["default_root_dir"]
    own = [ModelCheckpoint(folder, monitor="val/acc", mode="max", save_last=True), EarlyStopping("val/acc", mode="max")]
    t = Trainer(max_epochs=3, callbacks=[*own, *callbacks], **(trainer | {"enable_checkpointing": True}))
    t.fit(model, datamodule=VectorsDataModule())
    assert t.callback_metrics["val/acc_best"] >= t.callback_metrics["val/acc"]
    best = t.checkpoint_callback.best_model_path
    # the hyperparameters in it are partial functions
    trusted = {"weights_only": False} if "weights_only" in signature(t.validate).parameters else {}  # Lightning 2.6
    t.validate(model, datamodule=VectorsDataModule(), ckpt_path=best, verbose=False, **trusted)
    return model
