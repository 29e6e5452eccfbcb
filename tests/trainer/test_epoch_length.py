"""While measuring, the number of batches is what it will be in training, and Lightning still sets it itself."""

from __future__ import annotations

import math

import pytest
import torch
from lightning.pytorch.utilities import CombinedLoader
from torch.utils.data import DataLoader, IterableDataset

from tests.trainers import Classifier, blobs, hawq, loader, measuring, same_states, trainer

SEEN: list[tuple[bool, float, float]] = []  # no attribute of a module, which would be put back


class Scheduled(Classifier):
    """Weighs its loss by the share of training that is over, as domain adaptation does."""

    def loss(self, batch):
        if isinstance(batch, dict):
            batch = batch["a"]
        elif not isinstance(batch[0], torch.Tensor):
            batch = next(x for x in batch if x is not None)
        return super().loss(batch)

    def training_step(self, batch, batch_idx, dataloader_idx=0):
        t = self.trainer
        SEEN.append((t.fit_loop._combined_loader is None, t.num_training_batches, t.fit_loop.max_batches))
        n = t.num_training_batches
        share = 0.0 if math.isinf(n) else (batch_idx + self.current_epoch * n) / (t.max_epochs * n)
        return self.loss(batch) * (0.1 + share)


class Stream(IterableDataset):
    def __iter__(self):
        yield from (blobs()[i] for i in range(64))


class Batches:
    """No DataLoader at all."""

    def __iter__(self):
        yield from loader(shuffle=False)

    def __len__(self):
        return 4


CASES = {
    "whole": (loader, {}),
    "number": (loader, {"limit_train_batches": 3}),
    "more than there are": (loader, {"limit_train_batches": 9}),
    "share": (loader, {"limit_train_batches": 0.5}),
    "overfit": (loader, {"overfit_batches": 1}),
    "fast": (loader, {"fast_dev_run": 2}),
    "cut": (lambda: loader(batch_size=24, drop_last=True), {}),
    "stream": (lambda: DataLoader(Stream(), 16), {}),
    "limited stream": (lambda: DataLoader(Stream(), 16), {"limit_train_batches": 2}),
    "own": (Batches, {}),
    "several": (lambda: [loader(), loader(8)], {}),
    "in a dict": (lambda: {"a": loader(), "b": loader(32)}, {"limit_train_batches": 3}),
    "shortest": (lambda: CombinedLoader([loader(), loader(32)], "min_size"), {}),
    "longest": (lambda: CombinedLoader([loader(), loader(32)], "max_size"), {}),
}


@pytest.mark.filterwarnings("ignore:.*`overfit_batches`.*", "ignore:You requested to overfit.*")
@pytest.mark.parametrize("case", CASES)
def test_the_number_of_batches_is_that_of_training(tmp_path, case):
    make, settings = CASES[case]
    states = []
    for name in ("alone", "beside"):
        SEEN.clear()
        torch.manual_seed(3)
        model = Scheduled()
        fitted = trainer(tmp_path / name, *([measuring(images=8)] if name == "beside" else []), **settings)
        fitted.fit(model, make())
        states.append((model.state_dict(), fitted.global_step, fitted.num_training_batches))
    measured, trained = ({seen[1:] for seen in SEEN if seen[0] is early} for early in (True, False))
    assert measured == trained != set()
    assert same_states(states[0][0], states[1][0]) and states[0][1:] == states[1][1:]


@pytest.mark.parametrize("how", ["loader", "steps"])
def test_a_step_that_has_the_data_set_up_meanwhile_leaves_them_so(tmp_path, how):
    class Asks(Scheduled):
        def training_step(self, batch, batch_idx):
            t = self.trainer
            total = len(t.train_dataloader) if how == "loader" else t.estimated_stepping_batches
            return super().training_step(batch, batch_idx) * (1 + t.global_step / total)

    SEEN.clear()
    fitted = trainer(tmp_path, hawq(), limit_train_batches=3)
    fitted.fit(Asks(), loader())
    assert fitted.global_step == 3 == fitted.num_training_batches


def test_where_measuring_fails_the_number_is_put_back(tmp_path):
    class Fails(Scheduled):
        def training_step(self, batch, batch_idx):
            raise RuntimeError("of its own")

    fitted = trainer(tmp_path, hawq())
    with pytest.raises(RuntimeError, match="of its own"):
        fitted.fit(Fails(), loader())
    assert math.isinf(fitted.num_training_batches)
