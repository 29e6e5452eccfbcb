"""Batches and loaders of every form work, and loaders are left as they were."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from lightning.pytorch.utilities import CombinedLoader
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, IterableDataset, WeightedRandomSampler

from tests.small_network import Batch
from tests.trainers import Augmented, Classifier, blobs, fit, loader, measuring, same_states, trainer


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)


class Reshaped(Dataset):
    """The same images as tuple, list, dict, or nested."""

    def __init__(self, form):
        self.data, self.form = blobs(), form

    def __len__(self):
        return len(self.data)

    def __getitem__(self, i):
        x, y = self.data[i]
        return {
            "tuple": (x, y), "list": [x, y], "dict": {"x": x, "y": y}, "nested": {"in": {"x": x}, "out": [y]},
            "text": {"name": f"image {i}", "x": x, "y": y},
        }[self.form]  # fmt: skip


class AnyBatch(Classifier):
    def loss(self, batch):
        if isinstance(batch, dict):
            x, y = (batch["in"]["x"], batch["out"][0]) if "in" in batch else (batch["x"], batch["y"])
        else:
            x, y = batch
        return F.cross_entropy(self(x), y)


@pytest.mark.feature("Data", "batches as tuple, list, dict, nested, with text", "works")
@pytest.mark.parametrize("form", ["tuple", "list", "dict", "nested", "text"])
def test_batches_of_any_form(tmp_path, form):
    fit(tmp_path, AnyBatch(), DataLoader(Reshaped(form), 16))


class TwoLoaders(Classifier):
    def loss(self, batch):
        pairs = list(batch.values()) if isinstance(batch, dict) else list(batch)
        return sum(F.cross_entropy(self(x), y) for x, y in pairs)


class FromHooks(Classifier):
    """The data comes from the module's own hook."""

    def train_dataloader(self):
        return loader()


@pytest.mark.feature("Data", "several dataloaders, CombinedLoader", "works")
@pytest.mark.parametrize("form", ["dict", "list", "min_size", "max_size_cycle"])
def test_several_loaders(tmp_path, form):
    one, two = loader(), loader(8)
    data = {
        "dict": {"a": one, "b": two}, "list": [one, two], "min_size": CombinedLoader([one, two], "min_size"),
        "max_size_cycle": CombinedLoader({"a": one, "b": two}, "max_size_cycle"),
    }[form]  # fmt: skip
    fit(tmp_path, TwoLoaders(), data)


class Stream(IterableDataset):
    """A stream that keeps its position: whoever reads from it moves it on."""

    def __init__(self, count=64):
        self.rows, self.at, self.count = blobs(), 0, count
        self.given = []

    def __iter__(self):
        for _ in range(self.count):
            i = self.at % len(self.rows)
            self.at += 1
            self.given.append(i)
            yield self.rows[i]


class OwnIterable:
    """No DataLoader at all."""

    def __iter__(self):
        rows = blobs()
        for start in torch.randperm(4).tolist():
            yield rows[start * 16 : start * 16 + 16]

    def __len__(self):
        return 4


LOADERS = {
    "iterable": lambda: DataLoader(Stream(), 16),
    "generator": lambda: loader(generator=torch.Generator().manual_seed(5)),
    "weighted": lambda: DataLoader(blobs(), 16, sampler=WeightedRandomSampler(torch.rand(64) + 0.1, 64)),
    "weighted_generator": lambda: DataLoader(
        blobs(), 16, sampler=WeightedRandomSampler(torch.ones(64), 64, generator=torch.Generator().manual_seed(1))
    ),
    "augmented": lambda: DataLoader(Augmented(), 16, shuffle=True),
    "workers": lambda: loader(num_workers=1, persistent_workers=True),
    "own_iterable": OwnIterable,
    "hook": lambda: None,
}


@pytest.mark.parametrize("form", LOADERS)
def test_loaders_are_left_as_they_were(tmp_path, form):
    """Training over two epochs sees the same images in the same order, with and without the measurement."""
    results = []
    for name in ("alone", "beside"):
        torch.manual_seed(2)
        np.random.seed(2)
        random.seed(2)
        model = FromHooks()
        data = LOADERS[form]()
        extra = [measuring()] if name == "beside" else []
        trainer(tmp_path / name, *extra, max_epochs=2).fit(model, data)
        results.append(model.state_dict())
    assert len({s.bits for s in extra[0].plan.weights}) >= 2
    assert same_states(*results)


def test_the_measurement_sees_the_samplers_images(tmp_path):
    weights = torch.zeros(64)
    weights[:8] = 1.0
    data = DataLoader(blobs(), 16, sampler=WeightedRandomSampler(weights, 64))
    seen = []

    def loss_fn(module, batch):
        seen.extend(batch[0].tolist())
        return module.loss(batch)

    fit(tmp_path, Classifier(), data, loss_fn=loss_fn)
    allowed = {tuple(blobs()[i][0].tolist()) for i in range(8)}
    assert seen and {tuple(x) for x in seen} <= allowed


def test_half_precision_and_dataclasses_in_the_trainer(tmp_path):
    class Typed(Classifier):
        def loss(self, batch):
            return F.cross_entropy(self(batch.image), batch.label)

    def collate(items):
        return Batch(torch.stack([x for x, _ in items]), torch.stack([y for _, y in items]))

    fit(tmp_path, Typed(), loader(collate_fn=collate))
    fit(tmp_path, Classifier(), loader(), precision="16-true")
