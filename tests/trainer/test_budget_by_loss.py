"""Budgets by loss in a Trainer: measured on held-out data, before any training, and once only."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader

from hawq_lightning import HawqError
from hawq_lightning.callbacks import HAWQ
from hawq_lightning.selection import Outlook
from tests.console import Program
from tests.trainer import ddp_script
from tests.trainers import IMAGES, Classifier, blobs, hawq, loader, trainer

ROOT = Path(__file__).parent.parent.parent


@cache
def trained_state():
    torch.manual_seed(0)
    model = Classifier()
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    x, y = blobs().tensors
    for _ in range(30):
        optimizer.zero_grad()
        F.cross_entropy(model.net(x), y).backward()
        optimizer.step()
    return copy.deepcopy(model.state_dict())


def trained(kind: type[Classifier] = Classifier) -> Classifier:
    model = kind()
    model.load_state_dict(trained_state())
    return model


def validation():
    return DataLoader(blobs(48, seed=7), 16)


def by_loss(tmp_path, budget, *data, model=None, **given) -> HAWQ:
    callback = hawq(weight_bits=(2, 3, 4, 8), budget=budget, dirpath=tmp_path, **given)
    trainer(tmp_path, callback, max_epochs=1).fit(model or trained(), loader(), *data)
    return callback


@pytest.mark.parametrize(
    ("budget", "word"),
    [({"agreement": "97%"}, "agreement"), ({"kl": 0.01, "after": "batchnorm"}, "kl"),
     *(pytest.param(b, "kl", marks=pytest.mark.stress) for b in ({"kl": 0.01}, {"kl": 0.05, "bops": "60%"}))],
)  # fmt: skip
def test_the_plan_keeps_it_on_validation_data(tmp_path, budget, word):
    model = trained()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    callback = hawq(weight_bits=(2, 3, 4, 8), budget=budget, images=48, dirpath=tmp_path)
    trainer(tmp_path, callback, max_epochs=1, limit_train_batches=0).fit(model, loader(), validation())
    found = callback.plan.settings["by_loss"]
    assert found["measured_on"] == "48 validation samples" and found["after"] == budget.get("after", "quantizing")
    limit, measured = found[word]["limit"], found[word]["measured"]
    assert measured <= limit if word == "kl" else measured >= limit
    assert callback.plan.budget == budget
    after = model.state_dict()
    assert all(torch.equal(v, after[k]) for k, v in before.items() if k in after)  # statistics, too
    if found["after"] == "quantizing":
        x = torch.cat([b[0] for b in validation()])
        model.eval()
        with torch.no_grad():
            now = model.net(x).log_softmax(1)
            then = trained().eval().net(x).log_softmax(1)
        assert found["kl"]["measured"] == pytest.approx(float((then.exp() * (then - now)).sum(1).mean()), rel=1e-3)
        same = float((now.argmax(1) == then.argmax(1)).float().mean())
        assert found["agreement"]["measured"] == pytest.approx(same)


@pytest.mark.stress
def test_without_validation_data_train_data_are_kept_apart(tmp_path):
    all_of_it = by_loss(tmp_path / "a", {"kl": 0.05}, images=IMAGES).plan.settings["by_loss"]["measured_on"]
    assert all_of_it == f"{IMAGES // 4} train samples that nothing was forecast from"
    some = by_loss(tmp_path / "b", {"kl": 0.05}, images=32).plan.settings["by_loss"]["measured_on"]
    assert some == "32 train samples that nothing was measured on"


class OtherValidation(Classifier):
    def validation_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch["x"]), batch["y"])


@pytest.mark.stress
def test_validation_batches_that_training_step_cannot_read(tmp_path):
    data = DataLoader([{"x": x, "y": y} for x, y in blobs(16, 3)], 8)
    found = by_loss(tmp_path, {"kl": 0.05}, data, model=trained(OtherValidation)).plan.settings["by_loss"]
    assert "train samples" in found["measured_on"]


def test_what_cannot_be_kept_is_told_before_training(tmp_path):
    with pytest.raises(HawqError, match=r"No plan keeps kl 1e-12: the nearest has a KL of .* = 4x .*budget of {kl: "):
        by_loss(tmp_path, {"kl": 1e-12}, validation())
    assert not (tmp_path / "plan.json").exists()


class Regressor(Classifier):
    def training_step(self, batch, batch_idx):
        return F.mse_loss(self.net(batch[0]), F.one_hot(batch[1], 4).float())


@pytest.mark.parametrize("start_epoch", [0, pytest.param(1, marks=pytest.mark.stress)])
def test_a_network_without_classes_has_nothing_to_agree_on(tmp_path, monkeypatch, start_epoch):
    monkeypatch.setattr("hawq_lightning.sensitivity.measure", lambda *a, **k: pytest.fail("it measured first"))
    callback = hawq(budget={"agreement": "99%"}, start_epoch=start_epoch)
    with pytest.raises(HawqError, match="predictions to agree on.*{kl: 0.02}"):
        trainer(tmp_path, callback, max_epochs=2).fit(Regressor(), loader())


@pytest.mark.stress
def test_other_outputs_have_a_distance(tmp_path):
    found = by_loss(tmp_path, {"kl": 0.1}, model=Regressor()).plan.settings["by_loss"]
    assert found["kl"]["measured"] <= 0.1 and "agreement" not in found


def test_a_resumed_run_searches_no_more(tmp_path, monkeypatch):
    model = trained()
    first = hawq(weight_bits=(2, 3, 4, 8), budget={"kl": 0.05}, dirpath=tmp_path)
    t = trainer(tmp_path, first, max_epochs=1)
    t.fit(model, loader(), validation())
    t.save_checkpoint(tmp_path / "last.ckpt")
    again = hawq(weight_bits=(2, 3, 4, 8), budget={"kl": 0.05}, dirpath=tmp_path)
    monkeypatch.setattr(type(again.measure_callback), "analyze", lambda *a: pytest.fail("it searched again"))
    trainer(tmp_path, again, max_epochs=2).fit(Classifier(), loader(), validation(), ckpt_path=tmp_path / "last.ckpt")
    assert again.plan.to_dict() == first.plan.to_dict()


@pytest.mark.stress
def test_two_processes_choose_alike(tmp_path):
    done = Program(ddp_script.by_loss, str(tmp_path), "ddp_fork", 2, cwd=ROOT).end()
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (torch.load(tmp_path / f"rank{r}.pt", weights_only=True)["plan"] for r in range(2))
    assert first == second and first["settings"]["by_loss"]["kl"]["measured"] <= 0.004


def test_the_outlook_is_there_without_such_a_budget(tmp_path):
    callback = hawq(weight_bits=(2, 4, 8), forecast="fast", dirpath=tmp_path)
    with pytest.raises(HawqError, match="forecast='fast'"):
        _ = callback.outlook
    trainer(tmp_path, callback, max_epochs=1, limit_train_batches=0).fit(trained(), loader(), validation())
    assert {*callback.outlook.forecasts} == {"quantizing", "batchnorm"} and len(callback.outlook.measured) <= 10
    assert Outlook.load(tmp_path / "forecast.json").to_dict() == callback.outlook.to_dict()
    head = (tmp_path / "frontier.csv").read_text().splitlines()[0].split(",")
    assert {"kl", "changed", "kl_batchnorm", "changed_batchnorm"} <= {*head}
    assert "by_loss" not in callback.plan.settings


def test_stopping_by_the_plan_needs_a_size():
    with pytest.raises(HawqError, match="budget by loss"):
        hawq(budget={"kl": 0.05}, stop_when="stable_plan")
