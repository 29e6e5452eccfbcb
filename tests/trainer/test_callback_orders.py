"""HAWQ and the callbacks beside it give the same network in whatever order they stand, also where a fit is resumed."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint

from hawq_lightning import (
    HAWQ,
    ApplyPlan,
    BlockwiseOrder,
    Distillation,
    FreezeSchedule,
    HawqError,
    MeasureConfig,
    Plan,
    PostTraining,
    QuantizerConfig,
    SelectConfig,
)
from hawq_lightning.quantization import enabled_bits
from tests.trainers import Classifier, hawq, loader, trainer

DESIGN = """
from lightning.pytorch import Trainer
from hawq_lightning import HAWQ

trainer = Trainer(max_epochs=10, callbacks=[HAWQ(weight_bits=(2, 4, 8), activation_bits=8, budget="12x")])
trainer.fit(model, datamodule)      # traces -> plan -> fake-quant -> fine-tuning, no change to `model`
"""
FAST = MeasureConfig(images=32)
EPOCHS, BATCHES = 2, 3


@pytest.fixture(scope="module")
def plan(tmp_path_factory) -> Plan:
    """A measured plan, which the fits of this file share; BlockwiseOrder wants its Omega."""
    torch.manual_seed(0)
    callback = hawq(budget="11x")
    trainer(tmp_path_factory.mktemp("plan"), callback, max_epochs=1, limit_train_batches=1).fit(Classifier(), loader())
    return callback.plan


def make(name: str, plan: Plan) -> Callback:
    makers: dict[str, Callable[[], Callback]] = {
        "HAWQ": lambda: HAWQ(plan=plan, quantizer="lsq", measure=FAST, progress=False),
        "ApplyPlan": lambda: ApplyPlan(plan, "lsq"),
        "Distillation": lambda: Distillation(0.7),
        "FreezeSchedule": lambda: FreezeSchedule(batchnorm=0.4, ranges=0.7),
        "BlockwiseOrder": lambda: BlockwiseOrder(until=0.6),
        "PostTraining": lambda: PostTraining(("bias_correction",), measure=FAST),
    }
    return makers[name]()


def fit(
    folder: Path, names: Sequence[str], plan: Plan, checkpoint: Path | None = None, save: bool = False
) -> tuple[dict[str, torch.Tensor], list[Callback]]:
    torch.manual_seed(0)
    model, callbacks = Classifier(), [make(n, plan) for n in names]
    saving = [ModelCheckpoint(folder, "{epoch}", save_top_k=-1, every_n_epochs=1)] if save else []
    runs = trainer(
        folder, *callbacks, *saving, max_epochs=EPOCHS, limit_train_batches=BATCHES, enable_checkpointing=save
    )
    runs.fit(model, loader(8, shuffle=False), ckpt_path=checkpoint)
    assert enabled_bits(model) and all(getattr(c, "plan", plan).bits == plan.bits for c in callbacks)
    return model.state_dict(), callbacks


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], order: Sequence[str]) -> None:
    moved = [k for k in expected if not torch.equal(found[k], expected[k])]
    assert found.keys() == expected.keys() and not moved, f"{' > '.join(order)}: {moved[:3]}"


BESIDE = ("Distillation", "FreezeSchedule", "BlockwiseOrder", "PostTraining")
ALL = ("HAWQ", *BESIDE)
LONG = [ALL[::-1], ("Distillation", "PostTraining", "HAWQ", "BlockwiseOrder", "FreezeSchedule"), (*ALL[2:], *ALL[:2])]


@pytest.mark.parametrize("beside", [*((x,) for x in BESIDE), *itertools.combinations(BESIDE, 2)], ids="+".join)
def test_every_order_of_two_and_three_callbacks_trains_the_same_network(tmp_path, plan, beside):
    orders = list(itertools.permutations(("HAWQ", *beside)))
    expected, _ = fit(tmp_path, orders[0], plan)
    for order in orders[1:] if len(beside) == 1 else (*orders[2:4], orders[-1]):  # HAWQ in the middle and at the end
        assert_same(fit(tmp_path, order, plan)[0], expected, order)


def test_each_of_them_does_something(tmp_path, plan):
    alone, _ = fit(tmp_path, ("HAWQ",), plan)
    for beside in BESIDE:
        state, _ = fit(tmp_path, ("HAWQ", beside), plan)
        assert any(not torch.equal(state[k], alone[k]) for k in alone), beside


def test_orders_of_all_of_them_train_the_same_network_also_when_resumed_in_another(tmp_path, plan):
    expected, _ = fit(tmp_path, ALL, plan, save=True)
    middle = tmp_path / "epoch=0.ckpt"
    for order in LONG:
        assert_same(fit(tmp_path, order, plan)[0], expected, order)
    for order in (ALL, *LONG):
        assert_same(fit(tmp_path, order, plan, middle)[0], expected, order)


@pytest.mark.parametrize("beside", BESIDE)
def test_a_fit_is_resumed_with_the_two_the_other_way_round(tmp_path, plan, beside):
    expected, _ = fit(tmp_path, ("HAWQ", beside), plan, save=True)
    order = (beside, "HAWQ")
    assert_same(fit(tmp_path, order, plan, tmp_path / "epoch=0.ckpt")[0], expected, order)


def test_post_training_improves_what_apply_plan_quantizes_in_both_orders(tmp_path, plan):
    states = []
    for order in (("ApplyPlan", "PostTraining"), ("PostTraining", "ApplyPlan"), ("PostTraining", "HAWQ")):
        state, callbacks = fit(tmp_path, order, plan)
        (improving,) = (c for c in callbacks if isinstance(c, PostTraining))
        assert improving.improved["bias_correction"]
        states.append(state)
    assert_same(states[1], states[0], ["PostTraining", "ApplyPlan"])
    assert_same(states[2], states[0], ["PostTraining", "HAWQ"])
    torch.manual_seed(0)
    model, improving = Classifier(), PostTraining(("bias_correction",), measure=FAST)
    validated = trainer(tmp_path, improving, ApplyPlan(plan))
    validated.validate(model, loader(8, shuffle=False), verbose=False)  # by itself it quantizes, improves and scores
    assert improving.improved["bias_correction"] and enabled_bits(model)


class Blobs(LightningDataModule):
    def train_dataloader(self):
        return loader(32)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_five_lines_of_the_design_run_as_they_stand(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = Classifier()
    kind, layers = type(model), [type(m) for m in model.net]
    names: dict[str, object] = {"model": model, "datamodule": Blobs()}
    exec(DESIGN, names)
    (callback,) = (c for c in names["trainer"].callbacks if isinstance(c, HAWQ))
    assert type(model) is kind and isinstance(model, LightningModule)
    assert all(isinstance(m, t) for m, t in zip(model.net, layers))
    costs = callback.plan.costs
    assert costs["float_weight_bytes"] >= 12 * costs["weight_bytes"]
    assert enabled_bits(model) == callback.plan.bits


GIVEN_TWICE = {
    "weight_bits": lambda: HAWQ(weight_bits=4, quantizer=QuantizerConfig(weight_bits=(2, 4))),
    "activation_bits": lambda: HAWQ(activation_bits=None, quantizer=QuantizerConfig(activation_bits=4)),
    "budget": lambda: HAWQ(budget="4x", select=SelectConfig(budget="6x")),
}


@pytest.mark.parametrize("field", list(GIVEN_TWICE))
def test_a_setting_given_twice_is_one_clear_error(field):
    with pytest.raises(HawqError, match=rf"^{field} is given twice, by itself and in \w+Config\({field}=.+\)\.$"):
        GIVEN_TWICE[field]()
