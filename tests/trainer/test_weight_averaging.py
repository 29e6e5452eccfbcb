"""Averages of weights (EMA, SWA) beside the callback, in both orders."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch import callbacks
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, StochasticWeightAveraging
from torch import nn

from hawq_lightning import load_from_checkpoint
from hawq_lightning.quantization import enabled_bits, plan_of, quantized_layers
from tests.trainers import ORDERS, Classifier, Watch, fit_beside, hawq, loader, trainer


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


class Sanity(Callback):
    """Bits seen by every validation."""

    def __init__(self):
        self.bits = []

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        if batch_idx == 0:
            self.bits.append(enabled_bits(pl_module))


if not hasattr(callbacks, "EMAWeightAveraging"):
    pytest.skip("Lightning has these callbacks since 2.6", allow_module_level=True)

AVERAGES = {
    "ema": lambda: callbacks.EMAWeightAveraging(decay=0.9),
    "ema_slow": lambda: callbacks.EMAWeightAveraging(decay=0.9999, use_buffers=True),
    "average": lambda: callbacks.WeightAveraging(use_buffers=True),
    "swa": lambda: StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1),
}


@pytest.mark.feature(
    "Other callbacks", "WeightAveraging, EMAWeightAveraging, StochasticWeightAveraging, listed before or after", "works"
)
@ORDERS
@pytest.mark.parametrize("kind", AVERAGES)
def test_weight_averaging(tmp_path, kind, first):
    model, callback, sanity = Classifier(), hawq(), Sanity()
    t = fit_beside(tmp_path, model, callback, [AVERAGES[kind](), sanity], first, num_sanity_val_steps=1)
    wanted = enabled_bits(model)
    assert sanity.bits and all(bits == wanted for bits in sanity.bits)
    assert all(
        float(v) == round(float(v)) for k, v in model.state_dict().items() if k.endswith("_quantizer.num_bits")
    ), "widths stay whole numbers"
    before = t.validate(model, loader(shuffle=False), verbose=False)
    assert before[0]["val_loss"] < 2.0


@pytest.mark.feature("Other callbacks", "checkpoints of averaged weights", "hold the plan")
@ORDERS
def test_averaged_checkpoints_keep_the_plan(tmp_path, first):
    model, callback = Classifier(), hawq()
    saver, average = ModelCheckpoint(tmp_path, save_last=True), callbacks.EMAWeightAveraging(decay=0.9)
    fit_beside(tmp_path, model, callback, [average, saver], first, enable_checkpointing=True)
    loaded = load_from_checkpoint(Classifier, tmp_path / "last.ckpt")
    assert enabled_bits(loaded) == enabled_bits(model)


def test_arming_does_not_begin_averages_anew(tmp_path):
    def apart(t, m):
        (average,) = (c._average_model.module for c in t.callbacks if hasattr(c, "_average_model"))
        return float((average.net[0].weight - m.net[0].weight).abs().max())

    gaps = []
    for start in (1, 5):  # in the second no quantizer is enabled
        torch.manual_seed(0)
        watch = Watch(apart)
        fitted = trainer(
            tmp_path,
            hawq(start_epoch=start),
            callbacks.EMAWeightAveraging(decay=0.99),
            watch,
            max_epochs=6 if start == 5 else 2,
        )
        fitted.fit(Classifier(), loader(shuffle=False))
        gaps.append(watch.seen)
    batches = len(loader())
    assert gaps[0][:batches] == gaps[1][:batches]
    assert gaps[0][batches] == pytest.approx(gaps[1][batches], rel=0.3)  # not from 0


def test_averages_of_a_module_that_leaves_out_a_part(tmp_path):
    class MeasurementCheckpoint(Classifier):
        def __init__(self):
            super().__init__()
            self.judge = nn.Linear(3, 3).requires_grad_(False)
            self.strict_loading = False

        def state_dict(self, *args, **kwargs):
            return {k: v for k, v in super().state_dict(*args, **kwargs).items() if not k.startswith("judge")}

    model = MeasurementCheckpoint()
    trainer(tmp_path, hawq(exclude="judge"), callbacks.EMAWeightAveraging(decay=0.9)).fit(model, loader())
    assert enabled_bits(model)


def test_averaged_zero_points_are_whole(tmp_path):
    model = Classifier()
    callback = hawq(quantizer="int_only", weight_bits=8, budget="3.5x")
    trainer(tmp_path, callback, callbacks.EMAWeightAveraging(decay=0.5), max_epochs=3).fit(model, loader())
    for layer in quantized_layers(model).values():
        q = layer.weight_quantizer
        assert (q.eval_weight(torch.zeros_like(layer.weight)) == 0).all()
        assert float(q.zero_point) % 1 == 0 and q.code == "affine"
        assert torch.equal(q.dequantize(q.codes(layer.weight)), q.eval_weight(layer.weight))
    assert {s.code for s in plan_of(model).weights} == {"affine"}
