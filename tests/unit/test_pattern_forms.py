"""Patterns of layers in every form, in every place that takes them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import nn
from torch.nn import functional as F

from hawq_lightning import HawqError, QuantizerConfig, measure, sites
from hawq_lightning.quantization import prepare
from hawq_lightning.tasks import ClassificationTask
from tests.trainers import CLASSES, FEATURES, hawq, loader, trainer


class Head(nn.Linear):
    """A type of its own."""


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(FEATURES, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), Head(16, CLASSES))


def leaves_out(name: str) -> list[object]:
    """All forms of a pattern for the last layer, called ``name``."""
    return [
        name, [name], (name,), {name}, frozenset([name]), {name: 1}.keys(), f"{name[:-1]}[4]", Head, [Head], {Head},
        lambda n, m: n == name, [lambda n, m: isinstance(m, Head)], {name, Head},
    ]  # fmt: skip


FORMS = range(len(leaves_out("4")))
LEFT = {"0.weight", "2.weight"}
BATCH = torch.randn(8, FEATURES), torch.arange(8) % CLASSES


def loss(net, batch):
    return F.cross_entropy(net(batch[0]), batch[1])


@pytest.mark.parametrize("form", FORMS)
def test_functions_take_every_form(form):
    pattern = leaves_out("4")[form]
    assert {s.name for s in sites(network(), BATCH, exclude=pattern).weights} == LEFT
    assert {s.name for s in sites(network(), exclude=QuantizerConfig(exclude=pattern).exclude).weights} == LEFT
    assert [s.name for s in sites(network(), BATCH, include=pattern).weights] == ["4.weight"]
    assert set(prepare(network(), exclude=pattern)) == {"0", "2"}
    traces = measure(network(), [BATCH], loss, exclude=pattern, estimator="exact", progress=False)
    assert {r.name for r in traces if r.kind == "weight"} == LEFT


def test_functions_take_generators():
    of = lambda *names: (n for n in names)  # noqa: E731
    assert {s.name for s in sites(network(), BATCH, exclude=of("4")).weights} == LEFT
    assert {s.name for s in sites(network(), BATCH, include=of("0", "2"), exclude=of("2")).weights} == {"0.weight"}
    assert set(prepare(network(), exclude=of("4"), attention=True)) == {"0", "2"}
    traces = measure(network(), [BATCH], loss, exclude=of("4"), estimator="exact", progress=False)
    assert {r.name for r in traces if r.kind == "weight"} == LEFT
    config = QuantizerConfig(exclude=of("4"), include=map(str, (0, 2, 4)))
    for _ in range(2):
        assert {s.name for s in sites(network(), include=config.include, exclude=config.exclude).weights} == LEFT


class Task(LightningModule):
    def __init__(self):
        super().__init__()
        self.net = network()

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.01)


def plan_of(folder, task, **settings):
    callback = hawq(budget="4x", **settings)
    trainer(folder, callback, max_steps=1).fit(task, loader())
    return {s.name for s in callback.plan.weights}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.filterwarnings("ignore:HAWQ. the network looks untrained", "ignore:HAWQ. the gradient term")
@pytest.mark.filterwarnings("ignore:HAWQ. Much of the network stays float")
def test_the_callback_and_the_module_take_every_form(form, tmp_path):
    pattern = leaves_out("net.4")[form]
    own, by_property = Task(), type("ByProperty", (Task,), {"quantization_exclude": property(lambda s: pattern)})()
    own.quantization_exclude = pattern
    expected = {f"net.{n}" for n in LEFT}
    assert plan_of(tmp_path / "a", own) == expected
    assert plan_of(tmp_path / "b", by_property) == expected
    assert plan_of(tmp_path / "c", Task(), exclude=pattern) == expected


@pytest.mark.parametrize("form", FORMS)
def test_a_task_hands_on_every_form_of_its_network(form):
    net = network()
    net.quantization_exclude = leaves_out("4")[form]
    task = ClassificationTask(net, CLASSES)
    assert {s.name for s in sites(task, exclude=task.quantization_exclude).weights} == {f"net.{n}" for n in LEFT}


@pytest.mark.filterwarnings("ignore:HAWQ. Much of the network stays float")
def test_a_method_that_chooses_is_a_pattern(tmp_path):
    class Chooses(Task):
        def quantization_exclude(self, name, module):
            return name.endswith("4")

    class Static(Task):
        quantization_exclude = staticmethod(lambda name, module: isinstance(module, Head))

    for kind in (Chooses, Static):
        assert plan_of(tmp_path / kind.__name__, kind()) == {f"net.{n}" for n in LEFT}


WRONG = {
    "number": (4, "4, which is of type int"),
    "number in a list": (["4", 2.5], "2.5, which is of type float"),
    "dict": ({"4": True}, "which is of type dict"),
    "bytes": (b"4", "b'4', which is of type bytes"),
    "path": (Path("4"), "which is of type PosixPath"),
    "regular expression": (re.compile("4"), "which is of type Pattern"),
    "module": (nn.Linear(2, 2), "a module and not its name"),
    "one argument": (lambda name: True, "which does not take (name, module)"),
    "list in a list": ([["4"]], "which is of type list"),
    "nothing in a list": (["4", None], "None, which is of type NoneType"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_no_pattern_is_refused_by_its_name(name, tmp_path):
    pattern, says = WRONG[name]
    for field in ("include", "exclude"):
        calls = [
            lambda f=field: QuantizerConfig(**{f: pattern}), lambda f=field: sites(network(), BATCH, **{f: pattern}),
            lambda f=field: measure(network(), [BATCH], loss, **{f: pattern}),
            lambda f=field: prepare(network(), **{f: pattern}),
        ]  # fmt: skip
        for call in calls:
            with pytest.raises(HawqError, match=rf"{field}.* holds .*{re.escape(says)}; a pattern is .*'net.4'"):
                call()
    task = Task()
    task.__dict__["quantization_exclude"] = pattern
    with pytest.raises(HawqError, match=rf"^Task.quantization_exclude holds .*{re.escape(says)}"):
        plan_of(tmp_path, task)


def test_a_method_or_generator_in_the_place_of_patterns_says_what_to_write(tmp_path):
    class Method(Task):
        def quantization_exclude(self):
            return ["net.4"]

    with pytest.raises(HawqError, match=r"^Method.quantization_exclude is a method; write @property"):
        plan_of(tmp_path, Method())
    task = Task()
    task.quantization_exclude = (n for n in ["net.4"])
    with pytest.raises(HawqError, match=r"^Task.quantization_exclude is a generator, which gives its patterns once"):
        plan_of(tmp_path, task)
