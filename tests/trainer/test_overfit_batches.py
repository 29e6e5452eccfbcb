"""With ``overfit_batches``, a number or a share, exactly the batches that are trained on are measured."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.utilities import CombinedLoader
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, RandomSampler, SequentialSampler

from hawq_lightning import HawqError
from hawq_lightning.callbacks import MeasureTraces
from tests.trainers import CLASSES, FEATURES, Classifier, measuring, trainer

pytestmark = pytest.mark.filterwarnings("ignore:You requested to overfit", "ignore:.*overfit_batches")
IMAGES, BATCH = 36, 8  # the last batch has four


class Numbered(Dataset):
    """Every image holds its number."""

    def __len__(self):
        return IMAGES

    def __getitem__(self, i):
        return torch.full((FEATURES,), float(i)) / IMAGES, i % CLASSES


class Stream(IterableDataset):
    def __iter__(self):
        yield from (Numbered()[i] for i in range(IMAGES))


class Sized(Stream):
    def __len__(self):
        return IMAGES


class Backwards(BatchSampler):
    """Batches of one's own; the loader's sampler is then torch's, in order, and Lightning leaves it alone."""

    def __iter__(self):
        return iter([*super().__iter__()][::-1])


class Own(DataLoader):
    def __iter__(self):
        yield from super().__iter__()


class Listed:
    def __len__(self):
        return -(-IMAGES // BATCH)

    def __iter__(self):
        return iter(DataLoader(Numbered(), BATCH))


SHARES, NUMBERS = (0.25, 0.5, 1.0), (2, 9)
FORMS = {
    "in order": lambda: DataLoader(Numbered(), BATCH),
    "shuffled": lambda: DataLoader(Numbered(), BATCH, shuffle=True),
    "no part of a batch": lambda: DataLoader(Numbered(), BATCH, shuffle=True, drop_last=True),
    "own batches": lambda: DataLoader(Numbered(), batch_sampler=Backwards(SequentialSampler(Numbered()), BATCH, False)),
    "sampler": lambda: DataLoader(Numbered(), BATCH, sampler=RandomSampler(Numbered(), num_samples=20)),
    "items": lambda: DataLoader(Numbered(), None, shuffle=True),
    "own iteration": lambda: Own(Numbered(), BATCH, shuffle=True, drop_last=True),
    "no loader of torch's": Listed,
    "sized stream": lambda: DataLoader(Sized(), BATCH),
}  # fmt: skip
CASES = [(form, n) for form in FORMS for n in (*SHARES, *NUMBERS)] + [("stream", n) for n in (1.0, 2)]
FORMS["stream"] = lambda: DataLoader(Stream(), BATCH)


def numbers(x):
    return (x.reshape(-1, FEATURES)[:, 0] * IMAGES).round().int().tolist()


class Trained(Callback):
    def __init__(self):
        self.images = set()

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        for part in batch if isinstance(batch[0], (tuple, list)) else [batch]:
            self.images |= {*numbers(part[0])}


class Net(Classifier):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(FEATURES, 8), nn.ReLU(), nn.Linear(8, CLASSES))

    def training_step(self, batch, batch_idx=0):
        return self.loss((torch.atleast_2d(batch[0]), torch.atleast_1d(torch.as_tensor(batch[1]))))


def both(tmp_path, data, overfit, kind=Net):
    """Images that were trained on, and those that were measured."""
    drawn = []

    def count(batch):
        parts = batch if isinstance(batch[0], (tuple, list)) else [batch]
        drawn.extend(i for part in parts for i in numbers(part[0]))
        return len(torch.atleast_2d(parts[0][0]))

    seen = Trained()
    callback = measuring(images=500, rtol=9.0, max_probes=1, batch_size_fn=count)
    assert isinstance(callback, MeasureTraces)
    trainer(tmp_path, callback, seen, overfit_batches=overfit).fit(kind(), data)
    return seen.images, {*drawn}


@pytest.mark.parametrize(("form", "overfit"), CASES)
def test_what_is_measured_is_what_is_trained_on(tmp_path, form, overfit):
    trained, measured = both(tmp_path, FORMS[form](), overfit)
    assert trained and trained == measured


class Pair(Net):
    def training_step(self, batch, batch_idx=0):
        return sum(super(Pair, self).training_step(part) for part in batch)


@pytest.mark.parametrize("combined", [list, lambda pair: CombinedLoader(pair, "min_size")])
@pytest.mark.parametrize("overfit", [0.25, 0.5, 2, 5])
def test_of_several_loaders_each_has_its_share(tmp_path, combined, overfit):
    half = torch.utils.data.Subset(Numbered(), range(8, 32))
    pair = [DataLoader(half, 6), DataLoader(Numbered(), 6, shuffle=True)]
    trained, measured = both(tmp_path, combined(pair), overfit, Pair)
    assert trained == measured


def test_less_than_a_batch_is_refused_in_a_sentence(tmp_path):
    with pytest.raises(HawqError, match=r"overfit_batches=0.1\) is less than one of 5 batches; the least share is 0.2"):
        both(tmp_path, FORMS["shuffled"](), 0.1)
