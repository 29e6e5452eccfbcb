"""Generators that data sets, samplers and collate functions hold: training after measuring is training without it."""

from __future__ import annotations

import functools
import random

import numpy as np
import pytest
import torch
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Sampler, Subset, default_collate

from tests.trainers import IMAGES, Classifier, blobs, measuring, same_states, trainer

BATCH = 16
DRAW = {
    "torch": (lambda: torch.Generator().manual_seed(1), lambda g: float(torch.rand((), generator=g))),
    "numpy": (lambda: np.random.default_rng(1), lambda g: float(g.random())),
    "numpy, as it was": (lambda: np.random.RandomState(1), lambda g: float(g.rand())),
    "python": (lambda: random.Random(1), lambda g: g.random()),
}


class Chance:
    """A transform."""

    def __init__(self, kind):
        make, self.draw = DRAW[kind]
        self.generator_of_its_own = make()

    def __call__(self, row):
        x, y = row
        return x + self.draw(self.generator_of_its_own), y

    def collate(self, rows):
        return self(default_collate(rows))


class Rows(Dataset):
    def __init__(self, kind, transforms):
        self.transforms = transforms(Chance(kind))

    def __len__(self):
        return IMAGES

    def __getitem__(self, i):
        row = blobs()[i]
        for transform in self.transforms:
            row = transform(row)
        return row


class Shuffled(Sampler):
    def __init__(self, kind):
        self.chance = Chance(kind)

    def __len__(self):
        return IMAGES

    def __iter__(self):
        by_chance = [(self.chance.draw(self.chance.generator_of_its_own), i) for i in range(IMAGES)]
        yield from (i for _, i in sorted(by_chance))


class OwnIteration(DataLoader):
    def __iter__(self):
        yield from super().__iter__()


def closing_over(kind):
    chance = Chance(kind)
    return lambda rows: chance.collate(rows)


def in_a_list(transform):
    return [transform]


LOADERS = {
    "data set": lambda kind: DataLoader(Rows(kind, in_a_list), BATCH),
    "subset": lambda kind: DataLoader(Subset(ConcatDataset([Rows(kind, in_a_list)]), range(IMAGES)), BATCH),
    "tuple of transforms": lambda kind: DataLoader(Rows(kind, lambda t: (t.__call__,)), BATCH),
    "sampler": lambda kind: DataLoader(blobs(), BATCH, sampler=Shuffled(kind)),
    "collate object": lambda kind: DataLoader(blobs(), BATCH, collate_fn=Chance(kind).collate),
    "collate partial": lambda kind: DataLoader(blobs(), BATCH, collate_fn=functools.partial(Chance(kind).collate)),
    "collate closure": lambda kind: DataLoader(blobs(), BATCH, collate_fn=closing_over(kind)),
    "own iteration": lambda kind: OwnIteration(Rows(kind, in_a_list), BATCH),
}
CASES = [(form, "numpy") for form in LOADERS] + [("data set", kind) for kind in DRAW if kind != "numpy"]


@pytest.mark.parametrize(("form", "kind"), CASES)
def test_training_sees_the_same_data(tmp_path, form, kind):
    states = []
    for name in ("alone", "beside"):
        torch.manual_seed(3)
        model, validation = Classifier(), LOADERS[form](kind)
        extra = [measuring(loss_per_site=True)] if name == "beside" else []
        trainer(tmp_path / name, *extra, max_epochs=2).fit(model, LOADERS[form](kind), validation)
        states.append((model.state_dict(), [float(x) for batch in validation for x in batch[0].flatten()]))
    assert same_states(states[0][0], states[1][0])
    assert states[0][1] == states[1][1], "validation data are others"
