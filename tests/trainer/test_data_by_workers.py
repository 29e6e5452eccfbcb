"""Data that workers alone can read are measured, by workers of a copy; training goes as without it."""

from __future__ import annotations

import os

import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, Sampler, get_worker_info

from tests.trainers import IMAGES, Classifier, blobs, measuring, same_states, trainer

pytestmark = pytest.mark.filterwarnings("ignore:.*num_workers", "ignore:.*fork")
BATCH = 16


class Opened(Dataset):
    """Of files that ``worker_init_fn`` opens."""

    rows = None

    def __len__(self):
        return IMAGES

    def __getitem__(self, i):
        x, y = self.rows[i]
        return x + 0.1 * torch.randn(x.shape), y


class OpenedOnce(Opened):
    def __getitems__(self, ids):
        return [self[i] for i in ids]


def open_files(worker):
    assert get_worker_info().id == worker
    get_worker_info().dataset.rows = blobs()


class Asking(Dataset):
    """Reads from a place of its own in every worker."""

    def __len__(self):
        return IMAGES

    def __getitem__(self, i):
        assert get_worker_info().seed, "'NoneType' object has no attribute 'seed'"
        return blobs()[i]


class Shards(IterableDataset):
    def __iter__(self):
        me = get_worker_info()
        yield from (blobs()[i] for i in range(me.id, IMAGES, me.num_workers))


class Moved(Shards):
    """Reads on: what has been read is gone."""

    def __init__(self):
        self.at = 0

    def __iter__(self):
        for row in super().__iter__():
            self.at += 1
            yield row[0] + self.at, row[1]


class Collate:
    """Needs what workers alone have set up."""

    ready = False

    def set_up(self, worker):
        type(self).ready = True

    def __call__(self, rows):
        if not self.ready:
            raise RuntimeError("not set up")
        return torch.utils.data.default_collate(rows)


class Own(DataLoader):
    def __iter__(self):
        for x, y in super().__iter__():
            yield x / 10, y


class Drawn(Sampler):
    """With a generator of its own, and a count."""

    def __init__(self):
        self.generator, self.epochs = torch.Generator().manual_seed(3), [0]

    def __len__(self):
        return IMAGES

    def __iter__(self):
        self.epochs[0] += 1
        yield from torch.randperm(IMAGES, generator=self.generator).tolist()


def collating():
    collate = Collate()
    return DataLoader(blobs(), BATCH, num_workers=1, collate_fn=collate, worker_init_fn=collate.set_up)


def of_files(kind=DataLoader, data=Opened, **kwargs):
    return kind(data(), **{"batch_size": BATCH, "num_workers": 1, "worker_init_fn": open_files} | kwargs)


LOADERS = {
    "worker_init_fn": lambda: of_files(shuffle=True),
    "all at once": lambda: of_files(data=OpenedOnce),
    "two workers": lambda: of_files(num_workers=2, prefetch_factor=3),
    "kept workers": lambda: of_files(persistent_workers=True),
    "generator": lambda: of_files(shuffle=True, generator=torch.Generator().manual_seed(5)),
    "sampler": lambda: of_files(sampler=Drawn()),
    "batches": lambda: of_files(batch_size=1, batch_sampler=BatchSampler(Drawn(), BATCH, True)),
    "own iteration": lambda: of_files(Own),
    "get_worker_info": lambda: DataLoader(Asking(), BATCH, num_workers=1),
    "shards": lambda: DataLoader(Shards(), BATCH, num_workers=2),
    "shards, own iteration": lambda: Own(Shards(), BATCH, num_workers=2),
    "moved on": lambda: DataLoader(Moved(), BATCH, num_workers=1, persistent_workers=True),
    "collate": collating,
}


@pytest.mark.parametrize("form", LOADERS)
def test_data_that_only_workers_can_read_are_measured(tmp_path, form):
    states, callback = [], measuring(images=32)
    for name, extra in (("alone", []), ("beside", [callback])):
        torch.manual_seed(3)
        model = Classifier()
        trainer(tmp_path / name, *extra, max_epochs=2).fit(model, LOADERS[form]())
        states.append(model.state_dict())
    assert same_states(*states), "training went another way than without the measurement"
    assert callback.sensitivity.settings["images"] == 32


def test_the_same_is_measured_again(tmp_path):
    traces = []
    for name in ("one", "two"):
        callback = measuring(images=32)
        torch.manual_seed(3)
        model = Classifier()
        torch.manual_seed(len(name) + len(traces))  # whatever training has drawn so far
        trainer(tmp_path / name, callback).fit(model, of_files(shuffle=True))
        traces.append({r.name: r.trace for r in callback.sensitivity})
    assert traces[0] == traces[1]


class Broken(Asking):
    def __getitem__(self, i):
        raise LookupError("no such file" if get_worker_info() else "no worker")


def test_what_neither_can_read_is_told_of_as_training_would(tmp_path):
    with pytest.raises(LookupError, match="no such file") as raised:
        trainer(tmp_path, measuring()).fit(Classifier(), DataLoader(Broken(), BATCH, num_workers=1))
    assert "without them there was LookupError: no worker" in raised.value.__notes__[0]


PROCESSES: list[int] = []


class Plain(Dataset):
    processes = PROCESSES

    def __len__(self):
        return IMAGES

    def __getitem__(self, i):
        self.processes.append(os.getpid())
        return blobs()[i]


def test_workers_that_are_not_needed_stay_out_of_it(tmp_path):
    seen = []

    def count(batch):
        seen.extend(Plain.processes)
        return len(batch[0])

    data = DataLoader(Plain(), BATCH, num_workers=1, worker_init_fn=int)
    trainer(tmp_path, measuring(images=32, batch_size_fn=count)).fit(Classifier(), data)
    assert {*seen} == {os.getpid()} and not Plain.processes
