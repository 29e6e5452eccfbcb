"""The arguments of HAWQ in a whole fit: start, plans and traces that are given, budgets, patterns, files."""

from __future__ import annotations

import csv
import random

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger
from torch import nn

from hawq_lightning import HawqError, Plan, Sensitivity
from hawq_lightning.callbacks import ApplyPlan
from hawq_lightning.quantization import enabled_bits
from tests.trainers import FEATURES, Classifier, assert_mixed, fit, hawq, loader, same_states, trainer


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)


class Epochs(Callback):
    def __init__(self):
        self.enabled = []

    def on_train_epoch_end(self, trainer, pl_module):
        self.enabled.append(bool(enabled_bits(pl_module)))


@pytest.mark.feature("Modules", "float epochs first (`HAWQ(start_epoch=n)`)", "works")
def test_start_after_an_epoch(tmp_path):
    model, callback, epochs = Classifier(), hawq(start_epoch=1), Epochs()
    trainer(tmp_path, callback, epochs, max_epochs=3).fit(model, loader())
    assert epochs.enabled == [False, True, True]
    assert_mixed(model, callback)


def test_float_epochs_before_start_are_those_without_the_callback(tmp_path):
    states = []
    for extra in ([], [hawq(start_epoch=1)]):
        torch.manual_seed(4)
        model = Classifier()
        kept = Keep()
        trainer(tmp_path, *extra, kept, max_epochs=2).fit(model, loader())
        states.append(kept.states[0])
    assert same_states(*states)
    assert_mixed(model, extra[0])


class Keep(Callback):
    def __init__(self):
        self.states = []

    def on_train_epoch_end(self, trainer, pl_module):
        self.states.append({k: v.clone() for k, v in pl_module.state_dict().items()})


@pytest.mark.feature("Checkpoints", "a plan from a file or another run", "works; nothing is measured")
@pytest.mark.parametrize("as_file", [False, True])
def test_a_given_plan_is_installed_unmeasured(tmp_path, as_file):
    torch.manual_seed(0)
    first = fit(tmp_path / "a", Classifier(), loader())
    plan = tmp_path / "a" / "plan.json" if as_file else first.plan
    for callback in (hawq(plan=plan), ApplyPlan(plan)):
        model = Classifier()
        trainer(tmp_path / "b", callback).fit(model, loader())
        assert_mixed(model, callback)
        assert callback.plan.bits == first.plan.bits
        assert not (tmp_path / "b" / "sensitivity.json").exists()


@pytest.mark.parametrize("as_file", [False, True])
def test_given_traces_are_not_measured_again(tmp_path, monkeypatch, as_file):
    first = fit(tmp_path / "a", Classifier(), loader())
    monkeypatch.setattr("hawq_lightning.callbacks._measure.measure", lambda *a, **k: pytest.fail("measured again"))
    given = tmp_path / "a" / "sensitivity.json" if as_file else first.sensitivity
    model = Classifier()
    second = fit(tmp_path / "b", model, loader(), sensitivity=given, budget="6x")
    assert second.plan.costs["weight_bytes"] > first.plan.costs["weight_bytes"]
    assert [r.trace for r in second.sensitivity] == pytest.approx([r.trace for r in first.sensitivity])


@pytest.mark.parametrize(
    "budget",
    ["9x", "3.5bit", {"bops": "45%"}, {"weights": "9x", "act": "4x"}, {"weight_bytes": "330B"}],
    ids=str,
)
def test_forms_of_budgets(tmp_path, budget):
    activation_bits = (4, 8) if isinstance(budget, dict) and "act" in budget else 8
    callback = fit(tmp_path, Classifier(), loader(), budget=budget, activation_bits=activation_bits, input_bits=None)
    assert callback.plan.budget == budget


@pytest.mark.parametrize("unit, size", [("B", 1), ("kB", 1000), ("KiB", 1024)])
def test_budgets_of_the_file(tmp_path, unit, size):
    wanted = fit(tmp_path / "a", Classifier(), loader()).plan.costs["file_bytes"]
    callback = fit(tmp_path / "b", Classifier(), loader(), budget=f"{wanted / size:.6f}{unit}")
    assert callback.plan.costs["file_bytes"] <= wanted


def test_float_activations(tmp_path):
    model = Classifier()
    fit(tmp_path, model, loader(), activation_bits=None)
    assert not any(name.endswith(".input") for name in enabled_bits(model))


@pytest.mark.parametrize(
    "patterns, layers",
    [
        ({"include": "net.[04]"}, {"net.0", "net.4"}),
        ({"exclude": "net.6"}, {"net.0", "net.4"}),
        ({"exclude": lambda name, module: module.in_features == FEATURES}, {"net.4", "net.6"}),
        ({"include": [nn.Linear], "exclude": ["net.0"]}, {"net.4", "net.6"}),
    ],
    ids=["include", "exclude", "callable", "both"],
)
@pytest.mark.filterwarnings("ignore:HAWQ. Much of the network stays float")
def test_patterns(tmp_path, patterns, layers):
    model = Classifier()
    fit(tmp_path, model, loader(), budget="9x", weight_bits=(2, 4, 8), **patterns)
    assert {name.rpartition(".")[0] for name in enabled_bits(model)} == layers


def test_everything_is_saved(tmp_path):
    callback = fit(tmp_path, Classifier(), loader(), loss_per_site=True)
    assert Plan.load(tmp_path / "plan.json").bits == callback.plan.bits
    assert Sensitivity.load(tmp_path / "sensitivity.json").fingerprint == callback.plan.fingerprint
    assert (tmp_path / "frontier.csv").read_text().count("\n") > 3
    assert len(callback.loss_per_site) >= 3 * len(callback.plan.weights)


@pytest.mark.feature("Loggers", "CSVLogger", "works")
def test_traces_and_bits_reach_the_loggers(tmp_path):
    logger = CSVLogger(tmp_path, name="", version="")
    callback = hawq()
    model = Classifier()
    trainer(tmp_path, callback, logger=logger).fit(model, loader())
    assert_mixed(model, callback)
    with (tmp_path / "metrics.csv").open() as file:
        row = next(r for r in csv.DictReader(file) if r.get("hawq/bits/net.0.weight"))
    assert int(float(row["hawq/bits/net.0.weight"])) == callback.plan["net.0.weight"].bits
    assert float(row["hawq/mean_trace/net.0.weight"]) > 0


def test_a_start_that_is_never_reached_is_told(tmp_path):
    model = Classifier()
    with pytest.warns(UserWarning, match="before start_epoch=3"):
        trainer(tmp_path, hawq(start_epoch=3), max_epochs=5, max_steps=4).fit(model, loader())
    assert not enabled_bits(model)


def test_a_plan_is_kept_where_the_frontier_would_be_too_large(tmp_path):
    class Deep(Classifier):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(*(nn.Linear(12, 12) for _ in range(23)), nn.Linear(12, 4))

    device = {"ties": [["*.weight"]], "pairs": [(2, 4), (4, 4), (4, 8), (8, 8)]}
    callback = hawq(activation_bits=(4, 8), constraints=device, budget="8x", dirpath=tmp_path)
    trainer(tmp_path, callback).fit(Deep(), loader())
    with pytest.raises(HawqError, match="There is no frontier: "):
        callback.frontier  # noqa: B018
    assert len({s.bits for s in callback.plan.weights}) == 1
    assert (tmp_path / "plan.json").is_file() and not (tmp_path / "frontier.csv").exists()


def test_quadratic_forms_come_with_the_traces_and_go_into_the_plan(tmp_path):
    callback = hawq(quadratic_forms=True, loss_per_site=True)
    trainer(tmp_path, callback).fit(Classifier(), loader())
    with next(tmp_path.rglob("loss_check.csv")).open() as table:
        rows = list(csv.DictReader(table))
    assert all(float(r["kl"]) >= 0 and float(r["q"]) >= 0 for r in rows) and rows[0].keys() >= {"predicted", "measured"}
    assert all(c.q is not None and c.q_stderr is not None for s in callback.plan.sites for c in s.options)
    file = next(tmp_path.rglob("sensitivity.json"))
    assert Sensitivity.load(file).forms == callback.sensitivity.forms
    assert Plan.load(file.with_name("plan.json")) == callback.plan


def test_a_score_by_quadratic_forms_has_them_measured(tmp_path):
    callback = hawq(score="rounding")
    trainer(tmp_path, callback).fit(Classifier(), loader())
    assert callback.sensitivity.forms and callback.plan.settings["score"] == "rounding"
    with pytest.raises(HawqError, match="stable_plan.*score='both'"):
        hawq(score="both", stop_when="stable_plan")
