"""A DataLoader whose class finishes batches in its iteration is measured on what training gets, and not moved on."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset

from tests.trainers import CLASSES, FEATURES, IMAGES, Classifier, blobs, measuring, same_states, trainer

BATCH = 16


class Finished(DataLoader):
    """Scales in ``__iter__``, as loaders with augmentation on the GPU do."""

    def __iter__(self):
        for x, y in super().__iter__():
            yield x / 10, y


class Filtered(DataLoader):
    """Another iterator, as torch_geometric's neighbour loaders have it."""

    def _get_iterator(self):
        return ((x / 10, y) for x, y in super()._get_iterator())


class Counting(DataLoader):
    """Changes with every epoch, by a counter of its own, and its collate function is a method."""

    epoch = 0

    def __init__(self, *args, **kwargs):
        super().__init__(*args, collate_fn=self.join, **kwargs)

    def join(self, rows):
        return torch.stack([x for x, _ in rows]) / (10 + self.epoch), torch.stack([y for _, y in rows])

    def __iter__(self):
        self.epoch += 1
        yield from super().__iter__()


class Again:
    """A batch sampler that never ends."""

    def __init__(self, sampler):
        self.sampler = sampler

    def __iter__(self):
        while True:
            yield from iter(self.sampler)


class ForAllEpochs(DataLoader):
    """Keeps one iterator for all epochs, as timm's loader does."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        vars(self)["batch_sampler"] = Again(self.batch_sampler)
        self.iterator = super().__iter__()

    def __len__(self):
        return len(self.batch_sampler.sampler)

    def __iter__(self):
        for _ in range(len(self)):
            x, y = next(self.iterator)
            yield x / 10, y


class Stream(IterableDataset):
    """Whoever reads from it moves it on."""

    def __init__(self):
        self.at = 0

    def __iter__(self):
        for _ in range(IMAGES):
            self.at += 1
            yield blobs()[self.at % IMAGES]


def shuffled(kind, **kwargs):
    return kind(blobs(), BATCH, shuffle=True, **kwargs)


LOADERS = {
    "iter": lambda: shuffled(Finished),
    "get_iterator": lambda: shuffled(Filtered),
    "generator": lambda: shuffled(Finished, generator=torch.Generator().manual_seed(5)),
    "counter": lambda: shuffled(Counting),
    "workers": lambda: shuffled(Finished, num_workers=1, persistent_workers=True),
    "one iterator for all epochs": lambda: ForAllEpochs(blobs(), BATCH),
    "the same with workers": lambda: ForAllEpochs(blobs(), BATCH, num_workers=1),
    "stream": lambda: Finished(Stream(), BATCH),
    "whole items": lambda: Finished(torch.utils.data.StackDataset(*blobs().tensors), None),
}


SEEN: list[tuple[int, float]] = []  # no attribute of a module, which would be put back


class Recorded(Classifier):
    """Notes what its step is given."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(FEATURES, 8), nn.ReLU(), nn.Linear(8, CLASSES))

    def loss(self, batch):
        x, y = batch
        SEEN.append((self.trainer.global_step, float(x.detach().abs().mean())))
        return F.cross_entropy(self(torch.atleast_2d(x)), torch.atleast_1d(y))


@pytest.mark.filterwarnings("ignore:.*num_workers")
@pytest.mark.parametrize("form", LOADERS)
def test_what_is_measured_is_what_training_gets(tmp_path, form):
    states, given = [], {}
    for name in ("alone", "beside"):
        SEEN.clear()
        torch.manual_seed(2)
        model, data = Recorded(), LOADERS[form]()
        extra = [measuring(images=8)] if name == "beside" else []
        trainer(tmp_path / name, *extra, max_epochs=2).fit(model, data)
        states.append(model.state_dict())
        given[name] = [*SEEN]
    assert same_states(*states), "training went another way than without the measurement"
    trained, all_of_them = given["alone"], given["beside"]
    assert all_of_them[-len(trained) :] == trained
    measured = [size for _, size in all_of_them[: -len(trained)]]
    assert measured and max(measured) < 0.5, "the loader's own iteration was passed by"  # raw data are near one


@pytest.mark.parametrize("kind", [Finished, Filtered])
def test_images_to_overfit_and_validation_images_are_the_loaders_own(tmp_path, kind):
    SEEN.clear()
    model = Recorded()
    callback = measuring(loss_per_site=True, images=16)
    data = kind(blobs(), BATCH)
    trainer(tmp_path, callback, overfit_batches=1, limit_val_batches=1).fit(model, data, kind(blobs(), BATCH))
    assert SEEN and max(size for _, size in SEEN) < 0.5
    assert callback.loss_per_site


def test_plain_loaders_are_not_copied(tmp_path):
    """A class that changes nothing in iteration is read as before: workers stay out, and items keep their seeds."""

    class Named(DataLoader):
        def __len__(self):
            return super().__len__()

    class Net(LightningModule):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(FEATURES, CLASSES)

        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    traces = []
    for kind in (Named, DataLoader):
        torch.manual_seed(0)
        callback = measuring(budget="4x")
        trainer(tmp_path / kind.__name__, callback).fit(Net(), shuffled(kind))
        traces.append({r.name: r.trace for r in callback.sensitivity})
    assert traces[0] == traces[1]
