"""Code that asks for exact types sees another class from ``setup`` on: it is noticed and named."""

import random
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from hawq_lightning import HawqError
from hawq_lightning.quantization import fake_quant_disabled
from tests.trainers import Classifier, fit, hawq, loader, trainer


class ByType(Classifier):
    """Weighs its loss by what it counts of its layers."""

    def __init__(self, count):
        super().__init__()
        self.count = count

    def training_step(self, batch, batch_idx):
        return self.loss(batch) * self.count(self)


def equal(net):
    return 1 + sum(type(m) == nn.Linear for m in net.modules())  # noqa: E721


def identical(net):
    return 1 + sum(type(m) is nn.Linear for m in net.modules())


def among(net):
    return 1 + sum(m.__class__ in (nn.Linear, nn.Conv2d) for m in net.modules())


def named(net):
    return 1 + sum(type(m).__name__ == "Linear" for m in net.modules())


def leaves(net):
    return 1 + sum(not list(m.children()) for m in net.modules())


def subclass(net):
    return 1 + sum(isinstance(m, nn.Linear) for m in net.modules())


@pytest.mark.feature(
    "Modules",
    "code that asks for exact types, `type(m) is nn.Conv2d`",
    "a warning that names the loss with and without fake-quant layers, and the way out",
)
@pytest.mark.parametrize("count", [equal, identical, among, named, leaves])
def test_another_loss_is_told_once(tmp_path, count):
    net = ByType(count)
    with pytest.warns(UserWarning, match=r"some code asks for exact types.*isinstance\(m, torch.nn.Conv2d\)") as told:
        fit(tmp_path, net, loader())
    assert sum("exact types" in str(w.message) for w in told) == 1


class InItsForward(Classifier):
    def forward(self, x):
        for m in self.net:
            x = 2 * m(x) if type(m) is nn.Linear else m(x)
        return x


def test_the_line_is_named_and_float_epochs_are_covered(tmp_path):
    net = InItsForward()
    with pytest.warns(UserWarning, match="InItsForward: x = 2 .* if type.m. is nn.Linear") as told:
        trainer(tmp_path, hawq(start_epoch=1), max_epochs=2).fit(net, loader())
    assert sum("exact types" in str(w.message) for w in told) == 1


GAIN = {nn.Linear: 1.0, nn.BatchNorm1d: 1.0, nn.ReLU: 1.0, nn.Dropout: 1.0}


class OneEach(Classifier):
    def forward(self, x):
        for m in self.net:
            x = GAIN[type(m)] * m(x)
        return x


def test_a_step_that_fails_for_them_is_no_riddle(tmp_path):
    with pytest.raises(HawqError, match=r"fails with fake-quant layers \(KeyError.*OneEach: .*GAIN\[type\(m\)\]"):
        trainer(tmp_path, hawq()).fit(OneEach(), loader())


@pytest.mark.parametrize("chance", [False, True])
def test_other_code_is_not_blamed_and_nothing_moves(tmp_path, chance):
    class Net(ByType):
        def loss(self, batch):
            x, y = batch
            return F.cross_entropy(self(x + 0.1 * torch.randn_like(x) if chance else x), y)

    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        net = Net(subclass)
        fit(tmp_path, net, loader())
    assert not any("exact types" in str(w.message) for w in told)
    with fake_quant_disabled(net):
        net.training_step(next(iter(loader())), 0)


GENERATOR = torch.Generator()
LOUD = 10.0  # no two draws come close to one another by chance


class Slotted:
    __slots__ = ("generator",)

    def __init__(self):
        self.generator = torch.Generator().manual_seed(1)

    def __call__(self, x):
        return x + LOUD * torch.randn(x.shape, generator=self.generator)


def closure():
    draws = random.Random(3)
    return lambda x: x * LOUD * draws.random()


def of_the_module_file():
    return lambda x: x + LOUD * torch.randn(x.shape, generator=GENERATOR)


def counted():
    calls = iter(range(10**6))
    return lambda x: x * (1 + LOUD * next(calls))


class Noised(Classifier):
    noise = None  # set later: it is no hyperparameter

    def training_step(self, batch, batch_idx):
        x, y = batch
        return self.loss((self.noise(x), y))


@pytest.mark.parametrize("make", [Slotted, closure, of_the_module_file, counted])
def test_a_loss_that_is_another_at_every_call_is_told_as_that(tmp_path, make):
    torch.manual_seed(0)
    net = Noised()
    net.noise = make()
    with pytest.warns(UserWarning, match="the loss is not repeatable") as told:
        fit(tmp_path, net, loader())
    assert not [str(w.message) for w in told if "exact types" in str(w.message)]
