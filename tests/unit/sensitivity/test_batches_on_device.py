"""Batches that are kept for measuring stay where they are, and go to the device one at a time."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from hawq_lightning import MeasureConfig, Problem, candidates, measure, select, sites
from hawq_lightning.callbacks import HAWQ, PostTraining
from hawq_lightning.quantization import first_order_term, loss_per_site
from hawq_lightning.sensitivity import OnDevice, on_device, to_device, top_eigenvalues
from tests.trainers import CLASSES, FEATURES, Classifier, blobs, hawq, trainer

BATCHES = 6


class Moves:
    """How many moved batches live at a time, at the most, and how often something was moved.

    The last one made counts for :class:`OfRows`, which does not hold it: measuring puts back what a module holds.
    """

    last: Moves

    def __init__(self, living: bool = True) -> None:
        Moves.last = self
        self._living = living  # looking for what lives is slow
        self.count, self.peak, self.sums, self._made = 0, 0, [], []

    def moved(self, batch: object) -> None:
        self.count += 1
        if not self._living:
            return
        if self._alive() > 1:
            gc.collect(1)  # what lies in cycles
        if self._alive() > 1:
            gc.collect()
        self._alive()
        self._made.append(weakref.ref(batch))
        self.peak = max(self.peak, len(self._made))

    def _alive(self) -> int:
        self._made = [r for r in self._made if r() is not None]
        return len(self._made)


class Rows:
    """A batch of somebody's own, as graphs are: it moves by its method ``to``."""

    def __init__(self, x: torch.Tensor, y: torch.Tensor, moves: Moves | None = None) -> None:
        self.x, self.y, self.moves = x, y, moves

    def to(self, device: object, **_: object) -> Rows:
        out = Rows(self.x.to(device), self.y.to(device), self.moves)
        if self.moves is not None:
            self.moves.moved(out)
        return out

    def clone(self) -> Rows:
        return Rows(self.x.clone(), self.y.clone())


class Paired(list):
    """A pair that can be weakly referred to."""


class OfRows(Classifier):
    """Its batches are objects; they are counted as Lightning moves them."""

    @property
    def moves(self) -> Moves:
        return Moves.last

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(FEATURES, 8), nn.ReLU(), nn.Linear(8, CLASSES))

    def training_step(self, batch: Rows, batch_idx: int) -> torch.Tensor:
        return F.cross_entropy(self.net(batch.x), batch.y)


class ByTransfer(OfRows):
    """The module moves its batches itself."""

    def transfer_batch_to_device(self, batch: object, device: torch.device, dataloader_idx: int) -> object:
        out = Paired(t.to(device) for t in batch)
        self.moves.moved(out)
        return out

    def training_step(self, batch: Paired, batch_idx: int) -> torch.Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])


class Augmenting(ByTransfer):
    """It changes them in place once they are there, at random, and counts."""

    def on_after_batch_transfer(self, batch: Paired, dataloader_idx: int) -> Paired:
        if not self.trainer.training or self.trainer.sanity_checking:
            return batch
        self.moves.sums.append(float(batch[0].sum()))
        batch[0].mul_(2).add_(torch.rand(()))
        return batch


def loader(moves: Moves, of_rows: bool) -> DataLoader:
    data = blobs(BATCHES * 8)
    if not of_rows:
        return DataLoader(data, 8)
    x, y = data.tensors
    collate = lambda ids: Rows(x[list(ids)], y[list(ids)], moves)  # noqa: E731
    return DataLoader(range(len(y)), 8, collate_fn=collate)


def test_the_callback_moves_one_batch_at_a_time(tmp_path):
    moves = Moves()
    callback = hawq(images=BATCHES * 8)
    trainer(tmp_path, callback, limit_train_batches=1).fit(ByTransfer(), loader(moves, False))
    assert callback.sensitivity.settings["images"] == BATCHES * 8
    assert moves.count > 2 * BATCHES and moves.peak <= 2


def test_hooks_around_the_transfer_are_called_once_a_batch(tmp_path):
    moves = Moves(living=False)
    model, callback = Augmenting(), hawq(images=BATCHES * 8)
    fitting = trainer(tmp_path, callback, PostTraining(methods=["bias_correction"]), limit_train_batches=1)
    fitting.fit(model, loader(moves, False))
    assert len(moves.sums) == 2 * BATCHES + 1  # measured, corrected, and one step; each batch as it came
    assert sorted(moves.sums[:BATCHES]) == sorted(float(b[0].sum()) for b in DataLoader(blobs(BATCHES * 8), 8))


@pytest.mark.parametrize("estimator", ["auto", "hessian", "hutchinson"])
def test_functions_move_one_batch_at_a_time(estimator):
    torch.manual_seed(0)
    net, moves = nn.Sequential(nn.Linear(FEATURES, 8), nn.ReLU(), nn.Linear(8, CLASSES)), Moves()
    kept = [Rows(x, y, moves) for x, y in DataLoader(blobs(BATCHES * 8), 8)]
    plain = [(x.clone(), y.clone()) for x, y in DataLoader(blobs(BATCHES * 8), 8)]
    as_rows = lambda m, b: F.cross_entropy(m(b.x), b.y)  # noqa: E731
    as_pairs = lambda m, b: F.cross_entropy(m(b[0]), b[1])  # noqa: E731
    count = lambda b: len(b.y)  # noqa: E731
    config = MeasureConfig(estimator=estimator, sampling="all", rtol=0.5, max_probes=4)
    table = sites(net, plain[0])
    found = measure(net, kept, as_rows, config=config, sites=table, progress=False, batch_size_fn=count)
    assert moves.count >= BATCHES and moves.peak <= 2
    if estimator != "hutchinson":
        expected = measure(net, plain, as_pairs, config=config, sites=table, progress=False)
        assert [r.mean_trace for r in found] == pytest.approx([r.mean_trace for r in expected], rel=0.6)
    moves.peak = 0
    choices = candidates(net, kept, found, table, as_rows, batch_size_fn=count)
    loss_per_site(net, kept, as_rows, table, choices, batch_size_fn=count, progress=False)
    assert 1 <= moves.peak <= 2


def test_eigenvalues_and_the_first_order_term_move_one_batch_at_a_time():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(FEATURES, 8), nn.ReLU(), nn.Linear(8, CLASSES))
    moves, plain = Moves(), list(DataLoader(blobs(BATCHES * 8), 8))

    def move(batch: list[torch.Tensor]) -> Paired:
        out = Paired(t.clone() for t in batch)
        moves.moved(out)
        return out

    kept, loss_fn = OnDevice(plain, move), lambda m, b: F.cross_entropy(m(b[0]), b[1])
    assert top_eigenvalues(net, kept, loss_fn, progress=False) == pytest.approx(
        top_eigenvalues(net, plain, loss_fn, progress=False), rel=1e-5
    )
    table = sites(net, plain[0])
    traces = measure(net, kept, loss_fn, sites=table, progress=False, rtol=0.5, sampling="curvature")
    plan = select(Problem(table, candidates(net, kept, traces, table, loss_fn), traces), "8x")
    assert first_order_term(net, kept, loss_fn, plan) == first_order_term(net, plain, loss_fn, plan)
    assert moves.count > 3 * BATCHES and moves.peak <= 2


def test_a_sequence_that_moves():
    made = []

    def move(x: int) -> int:
        made.append(x)
        return 10 * x

    batches = OnDevice([1, 2, 3], move)
    assert len(batches) == 3 and batches[0] == batches[0] == 10 and made == [1]
    assert list(batches) == [10, 20, 30] and batches[-1] == 30 and made == [1, 2, 3]
    assert isinstance(batches[1:], OnDevice) and list(batches[1:]) == [20, 30] and on_device(batches, "cpu") is batches
    with pytest.raises(IndexError):
        batches[3]


@pytest.mark.parametrize(
    "batch",
    [
        nn.utils.rnn.pack_sequence([torch.randn(3, 2), torch.randn(2, 2)]),
        Rows(torch.ones(2), torch.ones(2), Moves()),
        {"x": [torch.ones(2)], "rows": (Rows(torch.ones(2), torch.ones(2), Moves()), "name")},
    ],
    ids=["packed", "own", "nested"],
)
def test_what_moves_by_itself_does(batch):
    moved = to_device(batch, torch.device("cpu"))
    assert type(moved) is type(batch)
    rows = moved["rows"][0] if isinstance(moved, dict) else moved
    if isinstance(rows, Rows):
        assert rows.moves.count == 1
    else:
        assert rows.batch_sizes.device.type == "cpu"


def test_measuring_leaves_the_trainers_batches_alone(tmp_path):
    data = DataLoader(blobs(16), 8)
    before = [t.clone() for t in data.dataset.tensors]
    trainer(tmp_path, HAWQ((2, 4, 8), budget="9x", progress=False), limit_train_batches=1).fit(Classifier(), data)
    assert all(torch.equal(a, b) for a, b in zip(before, data.dataset.tensors))
