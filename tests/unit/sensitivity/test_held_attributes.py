"""Attributes that a forward pass or a loss changes are put back exactly after measuring."""

from __future__ import annotations

import array
import collections
import copy
import random
import time

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import hawq_lightning as hl
from hawq_lightning.sensitivity import HeldAttributes
from tests.trainers import Classifier, fit, loader


class Meter:
    def __init__(self):
        self.total, self.seen = 0.0, []

    def update(self, x):
        self.total += float(x.detach().sum())
        self.seen.append(x.detach())


# what an attribute is, and how a step changes it
KINDS = {
    "number": (lambda: 3, lambda m, x: setattr(m, "state", m.state + 1)),
    "list": (lambda: [1, [2]], lambda m, x: (m.state.append(x), m.state[1].append(3))),
    "deque": (lambda: collections.deque([1, 2], maxlen=2), lambda m, x: m.state.append(x)),
    "counter": (lambda: collections.Counter(a=1), lambda m, x: m.state.update("ab")),
    "ordered": (lambda: collections.OrderedDict(a=1, b=2), lambda m, x: m.state.move_to_end("a")),
    "set": (lambda: {1, 2}, lambda m, x: m.state.discard(1)),
    "bytes": (lambda: bytearray(b"abc"), lambda m, x: m.state.extend(b"d")),
    "array": (lambda: array.array("d", [1.0, 2.0]), lambda m, x: m.state.append(3.0)),
    "numpy": (lambda: np.arange(4.0), lambda m, x: m.state.__iadd__(1)),
    "part of an array": (lambda: np.arange(8.0)[::2], lambda m, x: m.state.__imul__(2)),
    "tensor": (lambda: torch.zeros(3), lambda m, x: m.state.add_(1)),
    "expanded tensor": (lambda: torch.zeros(1, 3).expand(4, 3), lambda m, x: m.state[:1].add_(1)),
    "another tensor": (lambda: torch.zeros(3), lambda m, x: setattr(m.state, "data", x.detach().flatten()[:2].clone())),
    "tensors in a dict": (lambda: {"a": [torch.zeros(2)]}, lambda m, x: m.state["a"][0].add_(1)),
    "generator": (lambda: torch.Generator().manual_seed(1), lambda m, x: torch.rand(2, generator=m.state)),
    "numpy's generator": (lambda: np.random.default_rng(1), lambda m, x: m.state.random()),
    "python's generator": (lambda: random.Random(1), lambda m, x: m.state.random()),
    "meter": (Meter, lambda m, x: m.state.update(x)),
    "module in a list": (
        lambda: [nn.Linear(2, 2)], lambda m, x: [p.data.mul_(0.5) for p in m.state[0].parameters()],
    ),
    "features": (lambda: None, lambda m, x: setattr(m, "state", x)),
}  # fmt: skip


def contents(value):
    """Something that tells two states apart."""
    if isinstance(value, torch.Generator):
        return value.get_state().tolist()
    if isinstance(value, np.random.Generator):
        return str(value.bit_generator.state)
    if isinstance(value, random.Random):
        return value.getstate()
    if isinstance(value, (torch.Tensor, np.ndarray)):
        return type(value), tuple(value.shape), value.tolist()
    if isinstance(value, nn.Module):
        return {k: contents(v) for k, v in value.state_dict().items()}
    if isinstance(value, Meter):
        return contents(vars(value))
    if isinstance(value, dict):
        return type(value), [(k, contents(v)) for k, v in value.items()]
    return (type(value), [contents(v) for v in value]) if isinstance(value, (list, collections.deque)) else value


class Stateful(nn.Module):
    def __init__(self, kind):
        super().__init__()
        make, self.change = KINDS[kind]
        self.net = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))
        self.state = make()

    def forward(self, x):
        y = self.net(x)
        self.change(self, y)
        self.made_here = y
        return y


@pytest.mark.parametrize("kind", KINDS)
def test_attributes_come_back_as_they_were(kind):
    torch.manual_seed(0)
    model, batch = Stateful(kind), (torch.randn(4, 4), torch.arange(4) % 3)
    with torch.no_grad():
        probe = copy.deepcopy(model)
        probe(batch[0])
        assert contents(probe.state) != contents(model.state), "the step changes something"
    before, same, data = contents(model.state), model.state, getattr(model.state, "data", None)
    hl.measure(model, [batch], lambda m, b: F.cross_entropy(m(b[0]), b[1]), estimator="exact", progress=False)
    assert contents(model.state) == before and model.state is same and not hasattr(model, "made_here")
    if isinstance(same, torch.Tensor):
        assert same.data_ptr() == data.data_ptr() and same.stride() == data.stride()


def test_attributes_of_a_training_step_come_back(tmp_path):
    class Module(Classifier):
        def __init__(self):
            super().__init__()
            self.recent, self.counts = collections.deque(maxlen=3), np.zeros(2)
            self.wide, self.meter = torch.zeros(1, 2).expand(3, 2), Meter()

        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            self.recent.append(float(loss.detach()))
            self.counts += 1
            self.wide[:1].add_(1)
            self.meter.update(loss)
            return loss

    torch.manual_seed(0)
    model = Module()
    fit(tmp_path, model, loader())
    steps = len(loader())
    assert len(model.recent) == min(3, steps) and model.counts.tolist() == [steps, steps]
    assert model.wide[0].tolist() == [steps, steps] and len(model.meter.seen) == steps


MANY = 1_000_000
LARGE = {
    "numbers": (lambda: [*range(MANY)], lambda s: s.append(3)),
    "floats": (lambda: [i / 7 for i in range(MANY)], list.pop),
    "queue": (lambda: collections.deque(range(MANY), maxlen=MANY), lambda s: s.append(3)),
    "files": (lambda: [(f"{i}.png", i % 10) for i in range(MANY)], lambda s: s.reverse()),
    "table": (lambda: {f"{i}.png": i for i in range(MANY)}, lambda s: s.update(new=1)),
    "set": (lambda: {*range(MANY)}, lambda s: s.discard(5)),
}


@pytest.mark.parametrize("kind", LARGE)
def test_a_million_numbers_or_texts_take_less_than_a_second(kind):
    make, change = LARGE[kind]
    module = nn.Identity()
    module.state = made = make()
    expected = copy.copy(made)
    begun = time.process_time()
    held = HeldAttributes([module])
    noted = time.process_time()
    change(made)
    changed = time.process_time()
    held.put_back()
    assert time.process_time() - changed + noted - begun < 0.9
    assert module.state is made and made == expected
