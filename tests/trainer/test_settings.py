"""Settings of the Trainer and kinds of train data, each on a quantized network with unequal bits."""

import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.callbacks import (
    Callback,
)
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from hawq_lightning.quantization import enabled_bits
from tests.trainers import (
    Classifier,
    assert_mixed,
    blobs,
    fit,
    fit_beside,
    hawq,
    loader,
    trainer,
)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


class Seen(Callback):
    """Bits at every batch, by hook."""

    def __init__(self):
        self.train, self.val = [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.train.append(enabled_bits(pl_module))

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        self.val.append(enabled_bits(pl_module))


def run(folder, model, data, val=None, callback=None, **settings):
    """Fit; every batch of training and validation saw the enabled network."""
    callback, seen = callback or hawq(), Seen()
    t = trainer(folder, callback, seen, **({"max_epochs": 2} | settings))
    t.fit(model, data, val)
    assert_mixed(model, callback)
    wanted = enabled_bits(model)
    assert seen.train and all(bits == wanted for bits in seen.train + seen.val)
    return t, seen


SETTINGS = {
    "limits": {"limit_train_batches": 3, "limit_val_batches": 1, "val_check_interval": 1},
    "share": {"limit_train_batches": 0.5, "limit_val_batches": 0.5},
    "overfit": {"overfit_batches": 0.5},
    "fast_dev_run": {"fast_dev_run": True},
    "no_grad": {"inference_mode": False, "num_sanity_val_steps": 2},
    "inference_mode": {"inference_mode": True, "num_sanity_val_steps": 2},
    "reload": {"reload_dataloaders_every_n_epochs": 1},
    "steps": {"max_epochs": -1, "max_steps": 5},
    "anomalies": {"detect_anomaly": True},
    "deterministic": {"deterministic": True},
    "benchmark": {"benchmark": True, "barebones": False},
}


@pytest.mark.feature(
    "Settings",
    "`limit_*_batches`, `val_check_interval`, `overfit_batches`, `fast_dev_run`, `inference_mode`, sanity steps, "
    "`reload_dataloaders_every_n_epochs`, `max_steps`, `detect_anomaly`, `deterministic`, `benchmark`",
    "works",
)
@pytest.mark.parametrize("which", SETTINGS)
def test_settings(tmp_path, which):
    try:
        _, seen = run(tmp_path, Classifier(), loader(), loader(shuffle=False), **SETTINGS[which])
    finally:
        torch.use_deterministic_algorithms(False)  # the Trainer leaves it on
    assert which != "limits" or (len(seen.train), len(seen.val)) == (6, 6)


@pytest.mark.feature("Settings", "`barebones=True`", "works")
def test_barebones(tmp_path):
    model, callback = Classifier(), hawq()
    bare = {"logger": None, "enable_checkpointing": None, "enable_progress_bar": None, "enable_model_summary": None}
    trainer(tmp_path, callback, barebones=True, **(bare | {"num_sanity_val_steps": None})).fit(model, loader())
    assert_mixed(model, callback)


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


@pytest.mark.feature("Settings", "`torch.compile(module)` given to `fit`", "works; measured eagerly, trained compiled")
def test_a_compiled_module(tmp_path):
    model, callback = Classifier(), hawq()
    trainer(tmp_path, callback).fit(torch.compile(model, backend="eager"), loader())
    assert_mixed(model, callback)


# ------------------------------------------------------------ data


class Endless(IterableDataset):
    """No length, no position."""

    def __iter__(self):
        while True:
            for i in torch.randperm(64).tolist():
                yield blobs()[i]


class Module(LightningDataModule):
    """Data as a DataModule, made in ``setup``."""

    def setup(self, stage):
        self.rows = blobs()

    def train_dataloader(self):
        return DataLoader(self.rows, 16, shuffle=True)

    def val_dataloader(self):
        return DataLoader(self.rows, 16)


@pytest.mark.feature("Data", "an endless IterableDataset with `limit_train_batches`", "works")
def test_an_endless_stream(tmp_path):
    run(tmp_path, Classifier(), DataLoader(Endless(), 16), limit_train_batches=3)


@pytest.mark.feature("Data", "a LightningDataModule that makes its data in `setup`", "works")
def test_a_datamodule(tmp_path):
    run(tmp_path, Classifier(), Module())


@pytest.mark.feature("Data", "torchdata's StatefulDataLoader", "works")
def test_a_stateful_loader(tmp_path):
    stateful = pytest.importorskip("torchdata.stateful_dataloader").StatefulDataLoader
    run(tmp_path, Classifier(), stateful(blobs(), 16, shuffle=True))


# ------------------------------------------------------------ several optimizers and schedulers


class Two(Classifier):
    """Two optimizers and their schedulers, by hand."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        body, head = self.optimizers()
        loss = self.loss(batch)
        for optimizer in (body, head):
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer, schedule in zip((body, head), self.lr_schedulers()):
            optimizer.step()
            schedule.step()

    def configure_optimizers(self):
        body = torch.optim.SGD(self.net[:6].parameters(), 0.02)
        head = torch.optim.Adam(self.net[6].parameters(), 1e-3)
        return [body, head], [torch.optim.lr_scheduler.StepLR(x, 2) for x in (body, head)]


@pytest.mark.feature("Optimizers", "two optimizers, each with a scheduler", "works")
def test_two_optimizers_with_schedulers(tmp_path):
    t, _ = run(tmp_path, Two(), loader())
    assert [g["lr"] for o in t.optimizers for g in o.param_groups] != [0.02, 1e-3]


@pytest.mark.feature("Optimizers", "ReduceLROnPlateau on a validation metric", "works")
def test_plateau(tmp_path):
    class Plateau(Classifier):
        def configure_optimizers(self):
            optimizer = super().configure_optimizers()
            schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "monitor": "val_loss"}}

    run(tmp_path, Plateau(), loader(), loader(shuffle=False))


@pytest.mark.feature(
    "Settings", "`overfit_batches`, `limit_train_batches`, `accumulate_grad_batches`, `precision` bf16-mixed", "works"
)
@pytest.mark.parametrize(
    "settings",
    [
        {"overfit_batches": 2}, {"limit_train_batches": 2}, {"accumulate_grad_batches": 2}, {"precision": "bf16-mixed"},
    ],
    ids=lambda s: next(iter(s)),
)  # fmt: skip
def test_trainer_settings(tmp_path, settings):
    callback = fit(tmp_path, Classifier(), loader(), **settings)
    assert callback.sensitivity.settings["images"] == 32


@pytest.mark.feature("Settings", "`fast_dev_run`", "works")
def test_fast_dev_run(tmp_path):
    model, callback = Classifier(), hawq()
    trainer(tmp_path, callback, fast_dev_run=2).fit(model, loader())
    assert_mixed(model, callback)


@pytest.mark.feature("Optimizers", "OneCycleLR, LambdaLR, SequentialLR, CosineAnnealingLR", "works")
@pytest.mark.parametrize("schedule", ["OneCycleLR", "LambdaLR", "SequentialLR", "CosineAnnealingLR"])
def test_schedulers(tmp_path, schedule):
    class Scheduled(Classifier):
        def configure_optimizers(self):
            optimizer = torch.optim.AdamW(self.parameters(), lr=0.01)
            s = torch.optim.lr_scheduler
            scheduler = {
                "OneCycleLR": lambda: s.OneCycleLR(optimizer, max_lr=0.02, total_steps=12),
                "LambdaLR": lambda: s.LambdaLR(optimizer, lambda step: 0.9**step),
                "SequentialLR": lambda: s.SequentialLR(
                    optimizer, [s.ConstantLR(optimizer), s.ExponentialLR(optimizer, 0.9)], milestones=[2]
                ),
                "CosineAnnealingLR": lambda: s.CosineAnnealingLR(optimizer, 12),
            }[schedule]()
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    fit_beside(tmp_path, Scheduled(), hawq(), [], True)


@pytest.mark.feature("Settings", "a submodule compiled in place (`net.compile()`)", "works")
def test_a_compiled_network_is_measured_and_armed(tmp_path):
    model, callback = Classifier(), hawq()
    model.net.compile(backend="eager")
    fit_beside(tmp_path, model, callback, [], True, max_epochs=1)


@pytest.mark.feature("Settings", "`gradient_clip_val` and `accumulate_grad_batches`", "works")
def test_gradient_clipping_and_accumulation(tmp_path):
    fit_beside(tmp_path, Classifier(), hawq(), [], True, gradient_clip_val=0.5, accumulate_grad_batches=3)


@pytest.mark.feature("Settings", "`precision` 64-true, bf16-true", "works; quantization steps stay float32")
@pytest.mark.parametrize("precision", ["64-true", "bf16-true"])
def test_true_precisions(tmp_path, precision):
    model = Classifier()
    fit_beside(tmp_path, model, hawq(), [], True, precision=precision, max_epochs=1)
    scales = [v for k, v in model.state_dict().items() if k.endswith("_quantizer.scale")]
    assert scales and all(v.dtype == torch.float32 for v in scales)
