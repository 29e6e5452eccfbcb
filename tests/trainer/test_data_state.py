"""Whatever reading moves of data, in attributes, closures or containers, is put back before training reads them."""

from __future__ import annotations

import array
import collections
import functools
import multiprocessing
import threading
import time

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningDataModule
from PIL import Image
from torch import nn
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    Dataset,
    Sampler,
    StackDataset,
    Subset,
    default_collate,
)

from hawq_lightning.sensitivity import HeldAttributes
from tests.internals import internal
from tests.trainers import IMAGES, Classifier, blobs, measuring, same_states, trainer

BATCH = 16
data_state_kept = internal("callbacks._trainer._data_state").data_state_kept


class Meter:
    def __init__(self):
        self.count = 0


class Slotted:
    __slots__ = ("__private", "count")

    def __init__(self):
        self.count = 0

    def step(self):
        self.count += 1
        self.__private = self.count
        return self.count


class OfItsClass:
    count = 0
    seen: list[int] = []  # noqa: RUF012

    def step(self):
        type(self).count += 1
        self.seen.append(1)
        return len(self.seen)


def add(holder, name="count"):
    setattr(holder, name, getattr(holder, name, 0) + 1)
    return getattr(holder, name)


def append(values):
    values.append(1)
    return len(values)


def counted(values):
    values["a"] = values.get("a", 0) + 1
    return values["a"]


def more(values):
    values += 1
    return float(values.flatten()[0])


def of_function(function):
    function.calls = getattr(function, "calls", 0) + 1
    return function.calls


def with_default(state=[0]):  # noqa: B006
    state[0] += 1
    return state[0]


def closing_over():
    count, late = 0, None

    def step():
        nonlocal count, late
        count += 1
        late = (late or 0) + 1
        return late

    return step


class Layer(nn.Module):
    """A transform with a buffer and a counter, as those of torchvision and kornia are modules."""

    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.zeros(1))
        self.count = 0

    def forward(self):
        self.count += 1
        self.seen += 1
        return float(self.seen) + self.count


def shared_count(value):
    with value.get_lock():
        value.value += 1
    return value.value


# what a data set, a collate function or a sampler may hold, and how reading moves it: gives a number that goes on
STATES = {
    "new attribute": (type("Empty", (), {}), add),
    "number": (Meter, add),
    "slots": (Slotted, Slotted.step),
    "class": (OfItsClass, OfItsClass.step),
    "list": (list, append),
    "deque": (lambda: collections.deque(maxlen=100), append),
    "dict": (dict, counted),
    "counter": (collections.Counter, counted),
    "set": (lambda: {0}, lambda s: (s.add(len(s)), len(s))[1]),
    "array": (lambda: np.zeros(3), more),
    "python's array": (lambda: array.array("q"), append),
    "tensor": (lambda: torch.zeros(2), more),
    "bytes": (bytearray, append),
    "nested": (lambda: [{"a": (Meter(),)}], lambda s: add(s[0]["a"][0])),
    "closure": (closing_over, lambda f: f()),
    "function": (lambda: lambda: None, of_function),
    "default": (lambda: with_default, lambda f: f()),
    "partial": (lambda: functools.partial(append, [0]), lambda f: f()),
    "method": (lambda: Slotted().step, lambda f: f()),
    "module": (Layer, lambda m: m()),
    "shared": (lambda: multiprocessing.Value("i", 0), shared_count),
    "shared array": (lambda: multiprocessing.Array("d", 3), lambda a: a.__setitem__(0, a[0] + 1) or a[0]),
}


class Moving:
    """Something that is read, and moves on with it."""

    def __init__(self, kind):
        make, self.move = STATES[kind]
        self.state = make()

    def __call__(self, rows):
        return self.scaled(default_collate(rows))

    def scaled(self, row):
        x, y = row
        return x * (1 + 0.1 * self.move(self.state)), y


class Rows(Dataset):
    def __init__(self, kind):
        self.transforms = [Moving(kind)]

    def __len__(self):
        return IMAGES

    def __getitem__(self, i):
        return self.transforms[0].scaled(blobs()[i])


class Order(Sampler):
    def __init__(self, kind):
        self.moving = Moving(kind)

    def __len__(self):
        return IMAGES

    def __iter__(self):
        by = int(self.moving.move(self.moving.state))
        yield from (i * (2 * by + 1) % IMAGES for i in range(IMAGES))


class OwnLoader(DataLoader):
    def __iter__(self):
        self.moving = getattr(self, "moving", None) or Moving(self.kind)
        yield from map(self.moving.scaled, super().__iter__())


def own_loader(kind):
    OwnLoader.kind = kind
    return OwnLoader(blobs(), BATCH)


def wrapped(collate):
    return lambda rows: collate(rows)


def as_batch(row):
    return tuple(torch.as_tensor(value)[None] for value in row[0])


PLACES = {
    "data set": lambda kind: DataLoader(Rows(kind), BATCH),
    "in others": lambda kind: DataLoader(Subset(ConcatDataset([Rows(kind)]), range(IMAGES)), BATCH),
    "collate": lambda kind: DataLoader(blobs(), BATCH, collate_fn=Moving(kind)),
    "collate closure": lambda kind: DataLoader(
        blobs(), BATCH, collate_fn=(lambda c: lambda rows: c(rows))(Moving(kind))
    ),
    "sampler": lambda kind: DataLoader(blobs(), BATCH, sampler=Order(kind)),
    "batch sampler": lambda kind: DataLoader(blobs(), batch_sampler=BatchSampler(Order(kind), BATCH, False)),
    "own loader": own_loader,
    "whole items": lambda kind: DataLoader(StackDataset(Rows(kind)), None, collate_fn=as_batch),
}
CASES = [("data set", kind) for kind in STATES] + [(place, "number") for place in PLACES if place != "data set"]


class Plain(Classifier):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(12, 4)


def same_with_and_without(tmp_path, fitted, **settings):
    states = []
    for name, extra in (("alone", []), ("beside", [measuring(images=24, **settings)])):
        torch.manual_seed(3)
        OfItsClass.count, OfItsClass.seen, with_default.__defaults__[0][0] = 0, [], 0
        states.append(fitted(tmp_path / name, extra))
    assert same_states(states[0].state_dict(), states[1].state_dict())
    return states


@pytest.mark.parametrize(("place", "kind"), CASES)
def test_training_sees_the_same_data(tmp_path, place, kind):
    def fitted(folder, extra):
        model = Plain()
        trainer(folder, *extra, max_epochs=2).fit(model, PLACES[place](kind), PLACES[place](kind))
        return model

    same_with_and_without(tmp_path, fitted, loss_per_site=place == "collate")


class Stages(LightningDataModule):
    """Every call for a loader gives other data; hooks and steps leave things with it."""

    def __init__(self):
        super().__init__()
        self.stage, self.history, self.log_of = 0, [], {"moved": 0}
        self.cached = None

    def train_dataloader(self):
        self.stage += 1
        self.history.append(self.stage)
        if self.cached is None:
            self.cached = [(x + torch.randn(()), y) for x, y in blobs()]
        self.made_here = True
        return DataLoader(self.cached if self.stage == 1 else blobs(seed=self.stage), BATCH)

    def val_dataloader(self):
        self.history.append("val")
        return DataLoader(blobs(seed=len(self.history)), BATCH)

    def on_after_batch_transfer(self, batch, dataloader_idx):
        self.log_of["moved"] += 1
        return batch[0] * (1 + 0.01 * self.log_of["moved"]), batch[1]


class Tells(Plain):
    def training_step(self, batch, batch_idx):
        self.trainer.datamodule.history.append(float(batch[0].sum()))
        self.trainer.datamodule.stage += len(self.trainer.datamodule.history) // 10
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("settings", [{}, {"loss_per_site": True, "forecast": "fast"}])
def test_a_data_module_is_left_as_it_was(tmp_path, settings):
    kept = []

    def fitted(folder, extra):
        model, data = Tells(), Stages()
        trainer(folder, *extra, max_epochs=2, reload_dataloaders_every_n_epochs=1).fit(model, datamodule=data)
        kept.append((data.stage, data.history, data.log_of))
        return model

    same_with_and_without(tmp_path, fitted, **settings)
    assert kept[0] == kept[1]


class OwnLoaders(Plain):
    """The module makes its loaders."""

    def __init__(self):
        super().__init__()
        self.stage, self.lists = 0, [[]]

    def train_dataloader(self):
        self.stage += 1
        self.lists[0].append(self.stage)
        return DataLoader(blobs(seed=self.stage), BATCH)


def test_a_module_that_makes_loaders_is_left_as_it_was(tmp_path):
    def fitted(folder, extra):
        model = OwnLoaders()
        trainer(folder, *extra, max_epochs=2, reload_dataloaders_every_n_epochs=1).fit(model)
        assert (model.stage, model.lists) == (2, [[1, 2]])
        return model

    same_with_and_without(tmp_path, fitted)


class AsksForLoaders(Tells):
    """The loaders that training reads are made in its first step: what making them left has to stay."""

    def training_step(self, batch, batch_idx):
        assert len(self.trainer.train_dataloader) == 4
        return super().training_step(batch, batch_idx)


def test_what_belongs_to_loaders_that_training_reads_stays(tmp_path):
    data = Stages()
    trainer(tmp_path, measuring(images=24)).fit(AsksForLoaders(), datamodule=data)
    assert data.made_here and data.cached is not None


def test_the_data_themselves_are_not_copied():
    held = {
        "tensor": torch.zeros(5 << 20), "array": np.zeros(5 << 20, "f4"), "fixed": np.zeros(3), "numbers":
        [*range(10**6)], "files": [(f"{i}.png", i % 10) for i in range(10**6)], "deep": [[[i]] for i in range(20_000)],
    }  # fmt: skip
    held["fixed"].flags.writeable = False
    begun = time.process_time()
    with data_state_kept(held):
        held["tensor"] += 1
        held["array"] += 1
        held["numbers"].append(3)
        held["files"][5] = 0
        held["deep"][0][0].append(1)
    seconds = time.process_time() - begun
    assert held["tensor"][0] == 1 and held["array"][0] == 1, "they are put back"
    assert len(held["numbers"]) == 10**6 and held["files"][5] == ("5.png", 5)
    assert held["deep"][0] == [[0, 1]], "of many samples, what is in each is theirs"
    assert seconds < 1.5


class Pictures(Dataset):
    """Opens its file when it is first read, as every worker is to do for itself."""

    file = None

    def __init__(self, path):
        self.path = path

    def __len__(self):
        return IMAGES

    def __getitem__(self, i):
        if self.file is None:
            self.file = open(self.path, "rb")  # noqa: SIM115
        self.file.seek(i % 7)
        return blobs()[i][0] + self.file.read(1)[0] / 256, blobs()[i][1]


@pytest.mark.filterwarnings("ignore:unclosed file", "ignore:.*PytestUnraisableException")
def test_a_file_that_reading_opens_is_not_open_when_workers_begin(tmp_path):
    (tmp_path / "data").write_bytes(bytes(range(7)))
    data = Pictures(tmp_path / "data")
    loader = DataLoader(data, BATCH)
    trainer(tmp_path, measuring(images=24), max_steps=0).fit(Plain(), loader)
    assert data.file is None


@pytest.mark.filterwarnings("ignore:Sparse (CSR|CSC|BSR|BSC) tensor", "ignore:The PyTorch API of nested")
def test_tensors_of_other_layouts_are_passed_by():
    layouts = (torch.sparse_coo, torch.sparse_csr, torch.sparse_csc)
    odd = [torch.eye(3).to_sparse(layout=layout) for layout in layouts]
    odd += [torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=k) for k in (torch.strided, torch.jagged)]
    odd += [torch.ones(3, device="meta"), torch.ones(3, dtype=torch.complex64).conj(), torch.ones(1).expand(4)]
    held = [{"x": x, "more": [x]} for x in odd]
    module = nn.Identity()
    module.odd = odd
    with data_state_kept(held, module):
        held[0]["more"].append(1)
        held.pop()
        HeldAttributes([module]).put_back()
    assert all(rows["x"] is x for rows, x in zip(held, odd, strict=True))
    assert len(held[0]["more"]) == 1


def test_objects_of_packages_and_what_works_in_the_background_stay_as_they_are():
    class Prefetcher:
        def __init__(self):
            self.thread, self.ready = threading.Thread(), 0

    image, prefetcher, network = Image.new("L", (2, 2)), Prefetcher(), nn.BatchNorm1d(2)
    holder = [image, prefetcher, {"network": network}]
    with data_state_kept(holder, network=network):
        image.info = {"loaded": True}
        prefetcher.ready = 1
        network(torch.randn(3, 2))
    assert image.info and prefetcher.ready == 1 and network.num_batches_tracked == 1
