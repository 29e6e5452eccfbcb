"""Scores of the float epochs are not compared with those of the quantized network."""

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from hawq_lightning import HAWQ
from hawq_lightning.quantization import enabled_bits
from tests.trainers import weights_only


class Net(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))

    def training_step(self, batch, i):
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch, i):
        # the float epochs have by far the best scores
        self.log("val_loss", torch.tensor(float(self.current_epoch) / 10 + (10.0 if enabled_bits(self) else 0.0)))

    test_step = validation_step

    def predict_step(self, batch, i):
        return self.net(batch[0])

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), 0.01)
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=1)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": plateau, "monitor": "val_loss"}}


def loader():
    torch.manual_seed(0)
    x = torch.randn(32, 8)
    return DataLoader(list(zip(x, x[:, :3].argmax(1))), 16)


def trainer(folder, epochs, *callbacks):
    return pl.Trainer(
        max_epochs=epochs, callbacks=list(callbacks), logger=False, enable_progress_bar=False, accelerator="cpu",
        enable_model_summary=False, default_root_dir=folder,
    )  # fmt: skip


@pytest.mark.filterwarnings("ignore")
def test_best_is_an_epoch_of_the_quantized_network_and_patience_begins_anew(tmp_path):
    torch.manual_seed(0)
    best = pl.callbacks.ModelCheckpoint(dirpath=tmp_path / "best", monitor="val_loss", save_top_k=2)
    patience = pl.callbacks.EarlyStopping("val_loss", patience=2)
    fit = trainer(tmp_path, 8, HAWQ(budget="8x", start_epoch=2, progress=False), best, patience)
    net = Net()
    fit.fit(net, loader(), loader())
    assert best.best_model_score > 10 and patience.best_score > 10 and fit.current_epoch == 5
    assert "epoch=0" in " ".join(p.name for p in (tmp_path / "best").iterdir())  # files of float epochs are kept
    assert fit.test(net, loader(), ckpt_path="best", verbose=False, **weights_only(False))[0]["val_loss"] > 10


@pytest.mark.filterwarnings("ignore:.*num_workers")
@pytest.mark.parametrize("what", ["test", "predict"])
def test_a_float_network_under_hawq_is_told_once(tmp_path, what, recwarn):
    run = trainer(tmp_path, 1, HAWQ(budget="8x"))
    for _ in range(2):
        getattr(run, what)(Net(), loader())
    assert sum("this network is float" in str(w.message) for w in recwarn) == 1
