"""LightningModules as their users write them, small data, and what every test of the callback asserts."""

from __future__ import annotations

import inspect
import random
from dataclasses import fields

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, TensorDataset

from hawq_lightning import MeasureConfig, QuantizerConfig, SelectConfig
from hawq_lightning.callbacks import HAWQ, MeasureTraces
from hawq_lightning.quantization import enabled_bits, quantized_layers

FEATURES, CLASSES, IMAGES = 12, 4, 64


def weights_only(value):
    """That keyword of ``fit`` and its siblings, which Lightning 2.5 has not: files are read as torch does there."""
    return {"weights_only": value} if "weights_only" in inspect.signature(Trainer.fit).parameters else {}


def blobs(count=IMAGES, seed=0):
    """Four noisy clouds: images are vectors of 12 numbers."""
    g = torch.Generator().manual_seed(seed)
    y = torch.randint(0, CLASSES, (count,), generator=g)
    centres = torch.randn(CLASSES, FEATURES, generator=torch.Generator().manual_seed(99))
    return TensorDataset(centres[y] + 0.4 * torch.randn(count, FEATURES, generator=g), y)


class Augmented(Dataset):
    """Random augmentation from torch's, NumPy's and Python's generators."""

    def __init__(self):
        self.rows = blobs()

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        x, y = self.rows[i]
        return x + 0.1 * torch.randn(FEATURES) + random.random() * 0.1 + float(np.random.rand()) * 0.1, y


def loader(batch_size=16, shuffle=True, **kwargs):
    return DataLoader(blobs(), batch_size, shuffle=shuffle, **kwargs)


def mlp(width=16, out=CLASSES):
    return nn.Sequential(
        nn.Linear(FEATURES, width), nn.BatchNorm1d(width), nn.ReLU(inplace=True), nn.Dropout(0.1),
        nn.Linear(width, width + 8), nn.ReLU(), nn.Linear(width + 8, out),
    )  # fmt: skip


class Classifier(LightningModule):
    def __init__(self, width=16):
        super().__init__()
        self.save_hyperparameters()
        self.net = mlp(width)

    def forward(self, x):
        return self.net(x)

    def loss(self, batch):
        x, y = batch
        return F.cross_entropy(self(x), y)

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        x, y = batch
        logits = self(x)
        self.log("val_loss", F.cross_entropy(logits, y))
        self.log("val_acc", (logits.argmax(1) == y).float().mean())

    test_step = validation_step

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.02, momentum=0.9)


SMALL = {"budget": "9x", "images": 32, "rtol": 0.5, "progress": False}
CONFIGS = {"quantizer": QuantizerConfig, "measure": MeasureConfig, "select": SelectConfig}


def in_configs(**settings):
    """Fields of the three configs, given side by side, in their configs; what is no field stays a keyword."""
    keywords = {}
    if isinstance(settings.get("quantizer"), str):
        settings["name"] = settings.pop("quantizer")
    for argument, config in CONFIGS.items():
        names = {f.name for f in fields(config)} - ({"seed"} if argument == "select" else set())
        own = {k: settings.pop(k) for k in list(settings) if k in names}
        if own:
            keywords[argument] = config(**own)
    return keywords | settings


def hawq(**settings):
    """The callback for the small networks of this file."""
    return HAWQ(**in_configs(**(SMALL | settings)))


def measuring(**settings):
    """The callback that only measures."""
    return MeasureTraces(**in_configs(**(SMALL | settings)))


def trainer(folder, *callbacks, **kwargs):
    settings = {
        "max_epochs": 1, "accelerator": "cpu", "devices": 1, "logger": False, "enable_checkpointing": False,
        "enable_progress_bar": False, "enable_model_summary": False, "default_root_dir": folder,
        "num_sanity_val_steps": 0,
    }  # fmt: skip
    return Trainer(callbacks=list(callbacks), **(settings | kwargs))


def weight_widths(model):
    return {bits for name, bits in enabled_bits(model).items() if name.endswith(".weight")}


proofs = 0  # how often quantizers were found enabled with unequal bits: tests marked as a feature must do it


def assert_mixed(model, callback=None):
    """Armed, with at least two widths, and as the plan says."""
    global proofs
    proofs += 1
    assert len(weight_widths(model)) >= 2, enabled_bits(model)
    if callback is not None:
        known = enabled_bits(model)
        for site in callback.plan.sites:
            for layer in site.layers:
                assert known[f"{layer}.{'weight' if site.kind == 'weight' else 'input'}"] == site.bits


def assert_mixed_elsewhere(bits):
    """The same for ``enabled_bits`` of, or the plan that was enabled in, another process."""
    global proofs
    proofs += 1
    found = {b for n, b in bits.items() if n.endswith(".weight")}
    assert len(found) >= 2 and 0 not in found, bits


def plan_bits(plan):
    """Site -> bits of a plan as a dict."""
    return {s["name"]: s["bits"] for s in plan["sites"]}


def fit(folder, model, data, **kwargs):
    """Fit with HAWQ and one epoch; returns the callback."""
    own = {k: kwargs.pop(k) for k in list(kwargs) if k in TRAINER_KEYS}
    callback = hawq(**kwargs)
    trainer(folder, callback, **own).fit(model, data)
    assert_mixed(model, callback)
    return callback


TRAINER_KEYS = {"max_epochs", "accumulate_grad_batches", "precision", "overfit_batches", "limit_train_batches"}


def fit_beside(folder, model, callback, others, first, **kwargs):
    """Fit with ``callback`` before or after the ``others``, over three epochs; returns the Trainer."""
    callbacks = [callback, *others] if first else [*others, callback]
    t = trainer(folder, *callbacks, **({"max_epochs": 3} | kwargs))
    t.fit(model, loader(), loader(shuffle=False))
    assert_mixed(model, callback)
    return t


def same_states(a, b):
    """Bitwise equal state dicts, but for quantizers."""
    a, b = ({k: v for k, v in s.items() if "_quantizer." not in k} for s in (a, b))
    return a.keys() == b.keys() and all(torch.equal(v, b[k]) for k, v in a.items())


class Watch(Callback):
    """Calls a function of (trainer, module) after every batch and keeps what it gives."""

    def __init__(self, look):
        self.look, self.seen = look, []

    def on_train_batch_end(self, trainer, pl_module, *args):
        self.seen.append(self.look(trainer, pl_module))


def steps_of(pl_module):
    return [float(x.weight_quantizer.scale.flatten()[0]) for x in quantized_layers(pl_module).values()]


ORDERS = pytest.mark.parametrize("first", [True, False], ids=["hawq_first", "hawq_last"])
