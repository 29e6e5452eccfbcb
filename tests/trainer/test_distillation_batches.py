"""Distillation with steps that change their batch: the teacher gets it as the student did."""

from __future__ import annotations

from collections import namedtuple
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from hawq_lightning import Distillation, HawqError
from tests.trainers import Watch, hawq, trainer

Pair = namedtuple("Pair", "x y")
X = 20 * torch.randn(32, 6, generator=torch.Generator().manual_seed(0))
Y = torch.randint(0, 3, (32,), generator=torch.Generator().manual_seed(1))


@dataclass
class Data:
    x: torch.Tensor
    y: torch.Tensor


class Own:
    """A batch as libraries for detection have it: moved by its method."""

    def __init__(self, x, y):
        self.x, self.y, self.parts = x, y, [x]

    def to(self, *args, **kwargs):
        return Own(self.x.to(*args, **kwargs), self.y.to(*args, **kwargs))


def div_in_dict(b):
    b["x"].div_(10)
    return b["x"], b["y"]


def rebind(b):
    b["x"] = b["x"] / 10
    return b["x"], b["y"]


def popped(b):
    x, y = b.pop("x"), b.pop("y")
    return x / 10, y


def nested(b):
    b["in"][0] = b["in"][0] / 10
    return b["in"][0], b["y"]


def list_slice(b):
    b[0][:, :] = b[0] / 10
    return b


def named_tuple(b):
    b.x.div_(10)
    return b


def dataclass_rebound(b):
    b.x = b.x / 10
    return b.x, b.y


def own_class(b):
    b.x = b.parts.pop() / 10
    return b.x, b.y


def by_data(b):
    b["x"].data /= 10
    return b["x"], b["y"]


def by_numpy(b):
    b["x"].numpy()[:] /= 10
    return b["x"], b["y"]


def array(b):
    b["a"] /= 10
    return torch.from_numpy(b["a"]).float(), b["y"]


def keyed(x, y):
    return {"x": x, "y": y}


WAYS = [
    (div_in_dict, keyed), (rebind, keyed), (popped, keyed), (by_data, keyed), (by_numpy, keyed), (named_tuple, Pair),
    (list_slice, lambda x, y: [x, y]), (nested, lambda x, y: {"in": [x], "y": y}), (dataclass_rebound, Data),
    (own_class, Own), (array, lambda x, y: {"a": x.numpy().astype(np.float64), "y": y, "t": x}),
]  # fmt: skip


class Step(LightningModule):
    def __init__(self, read, late=0):
        super().__init__()
        torch.manual_seed(0)
        self.read, self.late = read, late
        self.net = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3))

    def training_step(self, batch, batch_idx):
        x, y = (batch["x"] / 10, batch["y"]) if batch_idx < self.late else self.read(batch)
        return F.cross_entropy(self.net(x), y)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def terms(folder, read, make, late=0):
    """What was added, step by step, zero where nothing was."""
    rows = DataLoader(list(zip(X, Y)), 4, collate_fn=lambda rows: make(*map(torch.stack, zip(*rows))))
    callback, seen = Distillation(), Watch(lambda t, m: dict(t.callback_metrics).get("train/distillation"))
    settings = {"batch_size_fn": lambda b: 4, "budget": "8x", "dirpath": folder}
    trainer(folder, hawq(**settings), callback, seen).fit(Step(read, late), rows)
    return [float(v) for v in seen.seen], callback


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return terms(tmp_path_factory.mktemp("plain"), lambda b: (b["x"] / 10, b["y"]), keyed)[0]


@pytest.mark.parametrize("read, make", WAYS, ids=lambda f: getattr(f, "__name__", ""))
def test_the_teacher_runs_on_the_batch_that_the_student_got(read, make, tmp_path, plain):
    assert terms(tmp_path, read, make)[0] == pytest.approx(plain, rel=1e-4)


def test_a_first_write_later_costs_one_term(tmp_path, plain):
    values, _ = terms(tmp_path, div_in_dict, keyed, late=3)
    assert values[:3] == pytest.approx(plain[:3], rel=1e-4)
    assert values[3] == values[2]  # the last logged one: the batch was gone
    # its weights moved without a pull, and from then on every term counts
    assert len(set(values[3:])) == len(values[3:])
    assert values[4:] == pytest.approx(plain[4:], rel=0.2)


def test_tensors_that_no_step_writes_into_are_not_copied_again(tmp_path):
    pointers: list[tuple[bool, int]] = []

    def read(b):
        pointers.append((torch.is_grad_enabled(), b["x"].data_ptr()))
        return b["x"] / 10, b["y"]

    terms(tmp_path, read, keyed)
    in_training = pointers[-8:]
    assert [grad for grad, _ in in_training] == [True, False] * 4
    assert all(a[1] == b[1] for a, b in zip(in_training[::2], in_training[1::2]))


def test_a_step_that_takes_an_iterator_is_refused(tmp_path):
    class Iterates(Step):
        def training_step(self, dataloader_iter):
            batch, _, _ = next(dataloader_iter)
            return F.cross_entropy(self.net(batch["x"]), batch["y"])

    model = Iterates(rebind)
    with pytest.raises(HawqError, match="Iterates.training_step takes dataloader_iter, so its teacher"):
        Distillation().copy_teacher(trainer(tmp_path), model)
