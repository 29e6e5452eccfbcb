"""Layers that are built in setup, in configure_model, by a dry run, or while a checkpoint is loaded."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule
from torch import nn
from torch.nn import functional as F

from hawq_lightning import HawqError, QuantizerConfig, load_from_checkpoint
from hawq_lightning.callbacks import HAWQ
from hawq_lightning.quantization import enabled_bits
from tests.trainers import (
    CLASSES,
    FEATURES,
    Classifier,
    fit,
    hawq,
    loader,
    mlp,
    trainer,
)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)


class InSetup(Classifier):
    def __init__(self):
        super().__init__()
        self.net = None

    def setup(self, stage):
        if self.net is None:
            self.net = mlp()


class InConfigureModel(Classifier):
    def __init__(self):
        super().__init__()
        self.net = None

    def configure_model(self):
        if self.net is None:
            self.net = mlp()


class InBoth(LightningModule):
    def __init__(self):
        super().__init__()
        self.body = nn.Linear(FEATURES, 16)
        self.middle = self.head = None

    def setup(self, stage):
        self.middle = self.middle or nn.Linear(16, 24)

    def configure_model(self):
        self.head = self.head or nn.Linear(24, CLASSES)

    def training_step(self, batch):
        x, y = batch
        return F.cross_entropy(self.head(self.middle(self.body(x).relu()).relu()), y)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05)


@pytest.mark.feature("Modules", "layers built in `setup` or `configure_model`", "works")
@pytest.mark.parametrize("kind", [InSetup, InConfigureModel, InBoth])
def test_layers_built_late(tmp_path, kind):
    model = kind()
    callback = fit(tmp_path, model, loader())
    assert len(callback.plan.weights) == 3


@pytest.mark.filterwarnings("ignore:HAWQ. Much of the network stays float")
def test_patterns_on_layers_built_late(tmp_path):
    model = InSetup()
    fit(tmp_path, model, loader(), exclude="net.0")
    assert not any(n.startswith("net.0") for n in enabled_bits(model))


class Lazy(Classifier):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.LazyLinear(16), nn.ReLU(), nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, CLASSES))
        self.net(torch.zeros(2, FEATURES))


@pytest.mark.feature("Modules", "lazy layers after their dry run", "works")
def test_lazy_layers_after_their_dry_run(tmp_path):
    fit(tmp_path, Lazy(), loader())


class Late(Classifier):
    """Layers are built in configure_model."""

    def __init__(self):
        super().__init__()
        del self.net

    def configure_model(self):
        if not hasattr(self, "net"):
            self.net = mlp()


@pytest.mark.parametrize("patterns", [{"include": "net.*"}, {"exclude": "net.6"}])
@pytest.mark.filterwarnings("ignore:HAWQ. Much of the network stays float")
def test_patterns_for_layers_that_are_built_later(patterns, tmp_path):
    fit(tmp_path, Late(), loader(), budget="6x", **patterns)
    with pytest.raises(HawqError, match="matches no quantizable layer"):
        trainer(tmp_path, HAWQ(quantizer=QuantizerConfig(include="body.*"), progress=False)).fit(Late(), loader())


def test_layers_may_be_built_while_a_checkpoint_is_loaded(tmp_path):
    class Late(Classifier):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(4, 4)

        def forward(self, x):
            return self.head(self.net(x))

    class Later(Classifier):
        def on_load_checkpoint(self, checkpoint):
            self.head = nn.Linear(4, 4)

    fitted = trainer(tmp_path, hawq())
    fitted.fit(Late(), loader())
    fitted.save_checkpoint(tmp_path / "x.ckpt")
    assert enabled_bits(load_from_checkpoint(Later, tmp_path / "x.ckpt"))["head.weight"]
    assert "head.weight" not in enabled_bits(load_from_checkpoint(Classifier, tmp_path / "x.ckpt", strict=False))
