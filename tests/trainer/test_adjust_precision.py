"""Precision adjusted through training: the budget narrows, bits move with a hysteresis, the optimizer goes on."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch.callbacks import Callback

from hawq_lightning import HAWQ, HawqError, MeasureConfig, Plan
from hawq_lightning.callbacks import AdjustPrecision
from hawq_lightning.quantization import enabled_bits
from tests.trainers import Classifier, loader, trainer

QUICK = MeasureConfig(images=16, rtol=0.9, max_probes=2)


class Look(Callback):
    """The optimizer's state and the weights' mean bits, epoch by epoch."""

    def __init__(self, hawq):
        self.hawq, self.seen = hawq, []

    def on_train_epoch_end(self, trainer, pl_module):
        held = trainer.optimizers[0].state
        steps = {int(s["step"]) for s in held.values() if "step" in s}
        self.seen.append((len(held), steps, self.hawq.plan.costs["w_comp"], dict(enabled_bits(pl_module))))


class Adam(Classifier):
    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 1e-3)


def fit(tmp_path, adjust, budget="4x", epochs=5, **settings):
    hawq = HAWQ((2, 3, 4, 6, 8), 8, budget, measure=QUICK, dirpath=tmp_path, progress=False, **settings)
    look, model = Look(hawq), Adam()
    run = trainer(tmp_path, hawq, adjust, look, max_epochs=epochs)
    run.fit(model, loader())
    return hawq, look, model


def test_the_budget_narrows_and_the_optimizer_goes_on(tmp_path):
    adjust = AdjustPrecision(9, every=1, until=0.5)
    hawq, look, model = fit(tmp_path, adjust, epochs=4)
    assert [h["epoch"] for h in adjust.history] == [1, 2]  # at 9 it ends
    wanted = [4 * (9 / 4) ** 0.5, 9]
    assert [h["budget"] for h in adjust.history] == pytest.approx(wanted)
    for (_, _, w_comp, _), least in zip(look.seen, [4, *wanted, 9]):
        assert w_comp >= least * (1 - 1e-5)
    assert look.seen[-1][3] == look.seen[2][3] == enabled_bits(model)
    states = [steps for _, steps, _, _ in look.seen]
    assert all(len(s) == 1 for s in states) and sorted(max(s) for s in states) == [max(s) for s in states]
    assert Plan.load(tmp_path / "plan.json").bits == hawq.plan.bits
    again = AdjustPrecision(9)
    again.load_state_dict(adjust.state_dict())
    assert again.history == adjust.history


@pytest.mark.stress
def test_a_wide_hysteresis_moves_fewer_bits(tmp_path):
    moved = {}
    for share in (0.0, 0.999):
        torch.manual_seed(0)
        adjust = AdjustPrecision(6.0, until=0.3, hysteresis=share)
        fit(tmp_path / str(share), adjust, "6x", epochs=4)
        moved[share] = sum(h["moved"] for h in adjust.history)
    assert moved[0.999] <= moved[0.0] and moved[0.999] == 0  # the budget stays, so nothing has to move


def test_what_cannot_be_is_told(tmp_path):
    for made, words in (
        (lambda: AdjustPrecision(0.5), "end is 0.5; it is how many times smaller"),
        (lambda: AdjustPrecision(8, hysteresis=1), "hysteresis is 1; it is a share"),
        (lambda: AdjustPrecision(8, every=0), "every is 0"),
        (
            lambda: fit(tmp_path, AdjustPrecision(8, every=3, until=0.8)),
            r"measures in no epoch from 4 on, of 5: 8x would not",
        ),
        (lambda: fit(tmp_path, AdjustPrecision(8), "3bit"), 'narrows a budget of weights such as "4x"'),
        (lambda: trainer(tmp_path, AdjustPrecision(8)).fit(Adam(), loader()), "works beside HAWQ"),
    ):
        with pytest.raises(HawqError, match=words):
            made()
