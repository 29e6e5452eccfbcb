"""What a callback must keep, or must not take from elsewhere: averages, ranges, teachers, another model's plan."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from torch import nn
from torch.nn.utils import weight_norm

from hawq_lightning import ApplyPlan, HawqError, MeasureTraces, load_from_checkpoint
from hawq_lightning.callbacks import ChannelsLast, weights_hash
from hawq_lightning.quantization import enabled_bits, plan_of, quantized_layers
from tests.trainers import Classifier, hawq, loader, mlp, trainer


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


class Watch(Callback):
    """Calls a function of (trainer, module) after every batch and keeps what it gives."""

    def __init__(self, look):
        self.look, self.seen = look, []

    def on_train_batch_end(self, trainer, pl_module, *args):
        self.seen.append(self.look(trainer, pl_module))


def steps_of(pl_module):
    return [float(x.weight_quantizer.scale.flatten()[0]) for x in quantized_layers(pl_module).values()]


def test_ranges_frozen_before_they_exist_are_those_of_arming(tmp_path):
    watch = Watch(lambda t, m: (t.current_epoch, steps_of(m)))
    trainer(tmp_path, hawq(quantizer="lsq", start=1, freeze_ranges=0), watch, max_epochs=2).fit(Classifier(), loader())
    late = [s for epoch, s in watch.seen if epoch == 1]
    assert all(s == late[0] for s in late) and all(0 < v < 0.9 for v in late[0])


def test_a_fit_that_goes_on_within_an_epoch_distils_at_once(tmp_path):
    keep = ModelCheckpoint(tmp_path / "c", every_n_train_steps=2, save_top_k=-1)
    saving = {"enable_checkpointing": True}
    trainer(tmp_path, hawq(distill=1.0), keep, max_epochs=2, max_steps=3, **saving).fit(Classifier(), loader())
    (middle,) = (tmp_path / "c").glob("*step=2*")
    watch = Watch(lambda t, m: "train/distillation" in t.callback_metrics)
    trainer(tmp_path, hawq(distill=1.0), watch, max_epochs=1).fit(Classifier(), loader(), ckpt_path=middle)
    assert watch.seen and all(watch.seen)


def test_arming_does_not_begin_averages_anew(tmp_path):
    def apart(t, m):
        (average,) = (c._average_model.module for c in t.callbacks if hasattr(c, "_average_model"))
        return float((average.net[0].weight - m.net[0].weight).abs().max())

    gaps = []
    for start in (1, 5):  # in the second no quantizer is armed
        torch.manual_seed(0)
        watch = Watch(apart)
        fitted = trainer(
            tmp_path, hawq(start=start), EMAWeightAveraging(decay=0.99), watch, max_epochs=6 if start == 5 else 2
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
    trainer(tmp_path, hawq(exclude="judge"), EMAWeightAveraging(decay=0.9)).fit(model, loader())
    assert enabled_bits(model)


def test_averaged_zero_points_are_whole(tmp_path):
    model = Classifier()
    callback = hawq(quantizer="int_only", weight_bits=8, budget="3.5x")
    trainer(tmp_path, callback, EMAWeightAveraging(decay=0.5), max_epochs=3).fit(model, loader())
    for layer in quantized_layers(model).values():
        q = layer.weight_quantizer
        assert (q.eval_weight(torch.zeros_like(layer.weight)) == 0).all()
        assert float(q.zero_point) % 1 == 0 and q.code == "affine"
        assert torch.equal(q.dequantize(q.codes(layer.weight)), q.eval_weight(layer.weight))
    assert {s.code for s in plan_of(model).weights} == {"affine"}


def test_measuring_on_an_armed_model_leaves_it_armed(tmp_path):
    model = Classifier()
    trainer(tmp_path, hawq()).fit(model, loader())
    before = enabled_bits(model)
    measuring = MeasureTraces(budget="9x", images=32, rtol=0.5, check_loss=True, progress=False, dirpath=tmp_path)
    trainer(tmp_path, measuring).fit(model, loader())
    again = copy.deepcopy(model)
    for layer in quantized_layers(again).values():
        layer.weight_quantizer.refresh(), layer.input_quantizer.refresh()
    assert enabled_bits(again) == enabled_bits(model) == before


def test_a_callback_on_a_model_that_is_armed_otherwise_tells_that_plan(tmp_path):
    first, second = Classifier(), Classifier()
    callback, other = hawq(weight_bits=4, budget="8x"), hawq(weight_bits=2, budget="16x")
    trainer(tmp_path, callback).fit(first, loader())
    trainer(tmp_path, other).fit(second, loader())
    trainer(tmp_path, callback).fit(second, loader())
    assert {s.bits for s in callback.plan.weights} == {2}


def test_a_compiled_network_loads_from_its_checkpoint(tmp_path):
    class Compiled(Classifier):
        def __init__(self):
            super().__init__()
            self.net = torch.compile(mlp(16), backend="eager")

    model, fitted = Compiled(), trainer(tmp_path, hawq())
    fitted.fit(model, loader())
    fitted.save_checkpoint(tmp_path / "x.ckpt")
    assert enabled_bits(load_from_checkpoint(Compiled, tmp_path / "x.ckpt")) == enabled_bits(model)


def test_a_checkpoint_brings_its_quantizers_options(tmp_path):
    model = Classifier()
    fitted = trainer(
        tmp_path, hawq(quantizer="int_only", quantizer_options={"momentum": 0.5}, weight_bits=8, budget="3x")
    )
    fitted.fit(model, loader())
    fitted.save_checkpoint(tmp_path / "x.ckpt")
    again = load_from_checkpoint(Classifier, tmp_path / "x.ckpt")
    assert plan_of(again).quantizer_options == plan_of(model).quantizer_options == {"momentum": 0.5}

    class Smaller(Classifier):
        def __init__(self, width=16):
            super().__init__(width)
            self.net = self.net[:-1]

    with pytest.raises(HawqError, match=r"'net\.6', which Smaller lacks"):
        load_from_checkpoint(Smaller, tmp_path / "x.ckpt")


def test_re_estimated_ranges_survive_a_restart_and_count_optimizer_steps(tmp_path):
    def run(folder, epochs, **kwargs):
        torch.manual_seed(0)
        model = Classifier()
        moved = Watch(lambda t, m: steps_of(m))
        callback = hawq(quantizer_options={"reestimate": 3})
        keep = ModelCheckpoint(folder, save_last=True)
        trainer(
            tmp_path, callback, keep, moved, max_epochs=epochs, enable_checkpointing=True, accumulate_grad_batches=2
        ).fit(model, loader(shuffle=False), **kwargs)
        return model, moved.seen

    whole, seen = run(tmp_path / "a", 4)
    assert len({tuple(s) for s in seen}) == 1 + (len(seen) // 2 - 1) // 3
    run(tmp_path / "b", 2)
    resumed, _ = run(tmp_path / "b2", 4, ckpt_path=tmp_path / "b" / "last.ckpt")
    assert all(torch.equal(v, whole.state_dict()[k]) for k, v in resumed.state_dict().items())


def test_a_plan_of_processes_that_were_spawned_stays_with_its_model(tmp_path):
    callback = hawq()
    spawned = {"strategy": "ddp_spawn", "devices": 1}
    first = Classifier()
    trainer(tmp_path, callback, **spawned).fit(first, loader())
    relay = callback.applier._handoff_file
    assert relay.is_file()
    never_fitted = Classifier()
    ApplyPlan.prepare(callback.applier, trainer(tmp_path, callback), first, "validate", callback)
    assert enabled_bits(first)
    ApplyPlan.prepare(callback.applier, trainer(tmp_path, callback), never_fitted, "validate", callback)
    assert not enabled_bits(never_fitted)


def test_what_processes_tell_each_other_by_is_removed_at_the_end():
    code = (
        "from hawq_lightning import ApplyPlan; c = ApplyPlan(); c._handoff_file.write_text('x'); print(c._handoff_file)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    path = Path(done.stdout.strip())
    assert path.name.startswith("hawq_lightning-") and not path.exists()


def test_channels_last_lays_out_what_it_can(tmp_path):
    class Late(Classifier):
        def configure_model(self):
            if not hasattr(self, "late"):
                self.late = nn.ModuleList([nn.Conv2d(4, 4, 3), nn.Conv3d(2, 2, 3)])

    model = Late()
    trainer(tmp_path, ChannelsLast()).fit(model, loader())
    assert model.late[0].weight.is_contiguous(memory_format=torch.channels_last)


def test_a_plan_is_kept_where_the_frontier_would_be_too_large(tmp_path):
    class Deep(Classifier):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(*(nn.Linear(12, 12) for _ in range(23)), nn.Linear(12, 4))

    device = {"ties": [["*.weight"]], "pairs": [(2, 4), (4, 4), (4, 8), (8, 8)]}
    callback = hawq(activation_bits=(4, 8), constraints=device, budget="8x", dirpath=tmp_path)
    trainer(tmp_path, callback).fit(Deep(), loader())
    assert callback.frontier is None and len({s.bits for s in callback.plan.weights}) == 1
    assert (tmp_path / "plan.json").is_file() and not (tmp_path / "frontier.csv").exists()


def test_layers_may_be_built_while_a_checkpoint_is_loaded(tmp_path):
    class Late(Classifier):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(4, 4)

        def forward(self, x):
            return self.head(self.net(x))

    class Later(Classifier):
        def on_load_checkpoint(self, checkpoint):
            self.head = nn.Linear(4, 4)

    fitted = trainer(tmp_path, hawq())
    fitted.fit(Late(), loader())
    fitted.save_checkpoint(tmp_path / "x.ckpt")
    assert enabled_bits(load_from_checkpoint(Later, tmp_path / "x.ckpt"))["head.weight"]
    assert "head.weight" not in enabled_bits(load_from_checkpoint(Classifier, tmp_path / "x.ckpt", strict=False))


def test_a_models_hash_is_that_of_what_a_hook_makes_its_weights_of():
    first = nn.Sequential(weight_norm(nn.Linear(4, 4)))
    again = nn.Sequential(weight_norm(nn.Linear(4, 4)))
    again.load_state_dict(first.state_dict())  # its weight is still the old one
    assert weights_hash(again) == weights_hash(first) != weights_hash(nn.Sequential(weight_norm(nn.Linear(4, 4))))


def test_a_head_for_objects_may_get_none(tmp_path):
    class Masked(Classifier):
        def __init__(self):
            super().__init__()
            self.mask = nn.Linear(4, 4)

        def training_step(self, batch, batch_idx):
            scores = self.net(batch[0])
            masks = self.mask(scores[batch[1] == 3])  # of some batches of 4 images none
            return scores.square().mean() + 0.01 * masks.square().sum()

    model = Masked()
    trainer(tmp_path, hawq(budget="5x", images=64)).fit(model, loader(batch_size=4))
    assert enabled_bits(model)["mask.weight"]
