"""Training steps that use loggers, their folders and logged values, measured before training: nothing is written."""

from __future__ import annotations

import os
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from torch import nn
from torch.nn import functional as F
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score

from hawq_lightning import HAWQ, HawqError, MeasureConfig
from tests.trainers import CLASSES, FEATURES, loader, trainer

FEW = MeasureConfig(max_probes=2)


class Run:
    """What a tracker in the web gives: a run with an id, series, sections and methods."""

    id, config = "r1", {"lr": 0.1, "names": ["a"]}

    def __init__(self, sent):
        self.sent = sent

    def add_image(self, *args):
        self.sent.append("image")

    def section(self):
        self.sent.append("section")
        return nullcontext(self)

    def __setitem__(self, key, value):
        self.sent.append(key)

    def __getitem__(self, key):
        self.sent.append(key)
        return self.sent


class Tracker(Logger):
    """Keeps count of everything that it is asked to send."""

    name, version, run_id = "tracked", 3, "r1"

    def __init__(self, folder):
        super().__init__()
        self.sent, self.folder = [], Path(folder)

    save_dir = property(lambda self: str(self.folder))
    experiment = property(lambda self: Run(self.sent))

    def log_metrics(self, metrics, step=None):
        self.sent.append(metrics)

    def log_hyperparams(self, *args, **kwargs): ...

    def log_table(self, rows):
        self.sent.append(rows)


class Step(LightningModule):
    """A step with one of the ways below at its end."""

    def __init__(self, way):
        super().__init__()
        torch.manual_seed(0)
        self.way = way
        self.net = nn.Sequential(nn.Linear(FEATURES, 8), nn.ReLU(), nn.Linear(8, CLASSES))
        self.accuracy = MulticlassAccuracy(CLASSES)
        self.both = MetricCollection([MulticlassAccuracy(CLASSES), MulticlassF1Score(CLASSES)])
        self.kept: Logger | None = None
        self.seen: list[object] = []

    def setup(self, stage):
        self.kept = self.trainer.loggers[2]

    def training_step(self, batch, batch_idx):
        logits = self.net(batch[0])
        loss = F.cross_entropy(logits, batch[1])
        factor = WAYS[self.way](self, loss, logits, batch[1])
        return loss * (1.0 if factor is None else factor)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.01)


def unpacked(s, *_):
    csv, board, tracker = s.loggers
    csv.log_metrics({"a": 1.0}, step=0)
    board.experiment.add_scalar("a", 1.0, 0)
    tracker.log_table([1])


def by_class(s, *_):
    for kind in (CSVLogger, TensorBoardLogger, Tracker):
        (one,) = [x for x in s.loggers if isinstance(x, kind)]
        assert isinstance(one, Logger)
    assert isinstance(s.logger, CSVLogger)
    assert not isinstance(s.logger, TensorBoardLogger)
    s.loggers[1].experiment.add_histogram("w", s.net[0].weight, 0)


def folders(s, *_):
    csv, board, tracker = s.loggers
    for place in (csv.log_dir, csv.root_dir, csv.save_dir, board.log_dir, tracker.save_dir, s.trainer.log_dir):
        assert os.path.isdir(os.path.dirname(os.path.join(place, "samples")))
    assert board.experiment.log_dir == board.log_dir


def names(s, *_):
    csv, _, tracker = s.loggers
    assert f"{csv.version:d}{csv.name}{csv.group_separator}{tracker.version:d}{tracker.run_id}".endswith("3r1")
    assert tracker.experiment.id == "r1"
    assert tracker.experiment.config["names"] == ["a"]
    assert not hasattr(csv, "watch")


def of_a_run(s, *_):
    run = s.loggers[2].experiment
    run["loss"].append(1.0)
    run["section"] = 2
    with run.section() as part:
        part.add_image(torch.zeros(1))
    assert "loss" in (*run["loss"], "loss")  # an end, too, where nothing is kept


def kept(s, *_):
    assert isinstance(s.kept, Tracker)
    s.kept.log_metrics({"a": 1.0})


def logged(s, loss, *_):
    s.log("l", loss)
    s.log("number", 2, logger=False)
    values, sent = s.trainer.callback_metrics, s.trainer.logged_metrics
    assert float(values["l"]) == float(loss)
    assert not values["l"].requires_grad
    assert "number" not in sent
    return values["number"] / 2


def logged_by_epoch(s, loss, *_):
    s.log("both", loss, on_step=True, on_epoch=True, prog_bar=True)
    s.log("late", loss, on_step=False, on_epoch=True)
    assert {"both", "both_step"} <= s.trainer.callback_metrics.keys()
    assert "both_step" in s.trainer.progress_bar_metrics
    assert "both" not in s.trainer.logged_metrics
    assert "late" not in s.trainer.callback_metrics


def logged_metrics(s, loss, logits, y):
    s.accuracy(logits, y)
    s.both(logits, y)
    s.log("accuracy", s.accuracy)
    s.log_dict(s.both)
    s.log_dict({"a": loss, "b": 1.0})
    values = s.trainer.callback_metrics
    assert float(values["accuracy"]) == float(values["MulticlassAccuracy"])
    assert {"MulticlassF1Score", "a", "b"} <= values.keys()


def only_of_this_step(s, loss, *_):
    s.seen.append("earlier" in s.trainer.callback_metrics)
    if s.global_step == 0:
        assert "earlier" not in s.trainer.callback_metrics
    s.log("earlier", loss)


WAYS = {f.__name__: f for f in (unpacked, by_class, folders, names, of_a_run, kept, logged, logged_by_epoch,
                                logged_metrics, only_of_this_step)} | {"plain": lambda *_: None}  # fmt: skip


class Watched(Step):
    """Compares what real loggers hold, and their folders, before and after every measured step."""

    def __init__(self, way, root):
        super().__init__(way)
        self.root = root

    def training_step(self, batch, batch_idx):
        if self.trainer.train_dataloader is not None:
            return super().training_step(batch, batch_idx)
        before = self.outside()
        loss = super().training_step(batch, batch_idx)
        assert before == self.outside()
        COUNT.append(self.way)
        return loss

    def outside(self):
        csv, board, tracker = REAL
        board.experiment.flush()
        files = {p: p.stat().st_size for p in Path(self.root).rglob("*") if p.is_file()}
        return files, len(csv.experiment.metrics), len(tracker.sent)


COUNT: list[str] = []
REAL: list[Logger] = []


def measured(way, folder):
    root = folder / f"{way} logs"
    REAL[:] = [CSVLogger(root, "csv"), TensorBoardLogger(root, "board"), Tracker(root)]
    COUNT.clear()
    module = Watched(way, root)
    callback = HAWQ(weight_bits=(2, 4, 8), budget="9x", progress=False, dirpath=folder / way, measure=FEW)
    start = Start()
    trainer(root, callback, start, logger=list(REAL), max_steps=1).fit(module, loader(shuffle=False))
    assert COUNT
    assert start.values == [{}, {}, {}]
    assert start.loggers == REAL
    assert module.kept is REAL[2]
    assert module.log.__func__ is LightningModule.log
    return {r.name: r.trace for r in callback.sensitivity}


class Start(Callback):
    """What the measurement leaves to training."""

    def on_train_start(self, trainer, pl_module):
        self.values = [
            dict(v) for v in (trainer.callback_metrics, trainer.logged_metrics, trainer.progress_bar_metrics)
        ]
        self.loggers = list(trainer.loggers)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.filterwarnings("ignore:HAWQ. the network looks untrained", "ignore:HAWQ. the gradient term")
@pytest.mark.filterwarnings("ignore:HAWQ. Much of the network stays float")
def test_a_step_that_logs_is_measured_as_one_that_does_not_and_writes_nothing(way, tmp_path):
    assert measured(way, tmp_path) == measured("plain", tmp_path)


@pytest.mark.parametrize("fails", [
    lambda s: os.path.join(s.loggers[1].experiment.get_logdir(), "a"),
    lambda s: f"{s.loggers[2].log_table([1]):.3f}",
    lambda s: s.trainer.callback_metrics["val_loss"],
    lambda s: os.stat(os.path.join(s.logger.log_dir, "made later.csv")),
    lambda s: s.loggers[3],
])  # fmt: skip
def test_what_cannot_be_told_early_hints_at_a_loss_function(fails, tmp_path, monkeypatch):
    monkeypatch.setitem(WAYS, "fails", lambda s, *_: fails(s))
    with pytest.raises((TypeError, LookupError, OSError)) as caught:
        measured("fails", tmp_path)
    assert not isinstance(caught.value, HawqError)
    assert any("loss_fn" in note for note in caught.value.__notes__)


@pytest.mark.filterwarnings("ignore:HAWQ. the network looks untrained", "ignore:HAWQ. the gradient term")
def test_a_dry_run_of_one_batch(tmp_path):
    class Dry(Step):
        def setup(self, stage): ...

        def training_step(self, batch, batch_idx):
            self.logger.experiment[0].add_image("a", batch[0])
            self.logger[0].experiment.add_image("a", batch[0])
            return super().training_step(batch, batch_idx)

    callback = HAWQ(weight_bits=(2, 4, 8), budget="9x", progress=False, dirpath=tmp_path, measure=FEW)
    trainer(tmp_path, callback, logger=True, fast_dev_run=True).fit(Dry("plain"), loader())
    assert callback.has_plan
