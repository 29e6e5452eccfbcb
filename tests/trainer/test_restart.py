"""Killed, resumed, tested in another process: the same plan, nothing measured twice, the same weights."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from hawq_lightning import ApplyPlan, Sensitivity, load_from_checkpoint
from hawq_lightning.quantization import enabled_bits
from tests.console import python
from tests.trainers import (
    Classifier,
    assert_mixed,
    assert_mixed_elsewhere,
    hawq,
    loader,
    measuring,
    plan_bits,
    same_states,
    trainer,
)

ROOT = Path(__file__).parent.parent.parent

# a user's script: plain shuffled DataLoader with an augmentation, dropout, last.ckpt every epoch
SCRIPT = """
import os, random, signal, sys
import numpy as np, torch
torch.set_num_threads(1)
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from tests.trainers import *
from tests.internals import internal
measuring = internal("callbacks._measure")

folder, ckpt, kill_epoch, kill_batch = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
seed_everything(7 if ckpt == "none" else 8, verbose=False)
original = measuring.measure
def measure(*args, **kwargs):
    print("measured", flush=True)
    return original(*args, **kwargs)
measuring.measure = measure

class Noisy(torch.utils.data.Dataset):
    def __len__(self):
        return 64
    def __getitem__(self, i):
        x, y = blobs()[i]
        return x + 0.1 * torch.randn(FEATURES) + 0.1 * random.random() + 0.1 * float(np.random.rand()), y

class Scheduled(Classifier):
    def configure_optimizers(self):  # the number of steps is asked for: the data stand before the fit starts
        made = super().configure_optimizers()
        schedule = torch.optim.lr_scheduler.OneCycleLR(made, 0.02, total_steps=self.trainer.estimated_stepping_batches)
        return [made], [{"scheduler": schedule, "interval": "step"}]

class Kill(Callback):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if (trainer.current_epoch, batch_idx) == (kill_epoch, kill_batch):
            os.kill(os.getpid(), signal.SIGKILL)

start = int(sys.argv[5])
callback, model = hawq(start_epoch=start), Classifier() if start else Scheduled()
saver = ModelCheckpoint(folder, save_last=True, save_top_k=-1, every_n_epochs=1)
t = trainer(folder, callback, Kill(), saver, max_epochs=4, enable_checkpointing=True)
t.fit(model, DataLoader(Noisy(), 16, shuffle=True), loader(shuffle=False), ckpt_path=None if ckpt == "none" else ckpt)
assert_mixed(model, callback)
torch.save({"state": model.state_dict(), "plan": callback.plan.to_dict(), "metrics": dict(t.callback_metrics),
            "sensitivity": callback.sensitivity.to_dict()}, folder + "/final.pt")
"""


def run(folder, ckpt="none", kill=(-1, -1), start=0):
    folder.mkdir(exist_ok=True)
    return python(SCRIPT, folder, ckpt, *kill, start, cwd=ROOT)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    done = run(folder)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("measured") == 1
    return folder, torch.load(folder / "final.pt", weights_only=True)


@pytest.mark.feature(
    "Restart",
    "SIGKILL in fine-tuning, resumed from an epoch's checkpoint",
    "the same plan, weights and metrics to the bit",
)
def test_killed_in_fine_tuning_and_resumed_gives_the_same_weights(tmp_path, undisturbed):
    killed = run(tmp_path / "run", kill=(2, 1))
    assert killed.returncode == -signal.SIGKILL
    resumed = run(tmp_path / "run", ckpt=tmp_path / "run" / "last.ckpt")
    assert resumed.returncode == 0, resumed.stderr[-2000:]
    assert "measured" not in resumed.stdout
    final, expected = torch.load(tmp_path / "run" / "final.pt", weights_only=True), undisturbed[1]
    assert final["plan"]["sites"] == expected["plan"]["sites"]
    assert_mixed_elsewhere(plan_bits(final["plan"]))
    assert final["sensitivity"]["records"] == expected["sensitivity"]["records"]
    assert final["state"].keys() == expected["state"].keys()
    assert all(torch.equal(v, expected["state"][k]) for k, v in final["state"].items())
    assert all(torch.equal(v, expected["metrics"][k]) for k, v in final["metrics"].items())


@pytest.mark.feature("Restart", "SIGKILL in the float epochs before `start`", "the same plan and weights to the bit")
def test_killed_before_start_measures_after_the_resume(tmp_path):
    undisturbed = run(tmp_path / "undisturbed", start=2)
    assert undisturbed.returncode == 0, undisturbed.stderr[-2000:]
    killed = run(tmp_path / "run", kill=(1, 2), start=2)
    assert killed.returncode == -signal.SIGKILL and "measured" not in killed.stdout
    resumed = run(tmp_path / "run", ckpt=tmp_path / "run" / "last.ckpt", start=2)
    assert resumed.returncode == 0 and resumed.stdout.count("measured") == 1, resumed.stderr[-2000:]
    final, expected = (torch.load(tmp_path / n / "final.pt", weights_only=True) for n in ("run", "undisturbed"))
    assert final["plan"]["sites"] == expected["plan"]["sites"]
    assert_mixed_elsewhere(plan_bits(final["plan"]))
    assert all(torch.equal(v, expected["state"][k]) for k, v in final["state"].items())


def new_python(source, *arguments, cwd):
    command = [sys.executable, "-c", source, *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120)


CHECK = """
import sys, torch
torch.set_num_threads(1)
from tests.trainers import *
from hawq_lightning import ApplyPlan
from hawq_lightning.quantization import enabled_bits
model = Classifier()
callback = hawq() if sys.argv[2] == "hawq" else ApplyPlan()
run = getattr(trainer(sys.argv[1], callback), sys.argv[3])
found = run(model, loader(shuffle=False), ckpt_path=sys.argv[1] + "/last.ckpt")
assert_mixed(model, callback)
torch.save({"found": found[0], "bits": enabled_bits(model)}, sys.argv[4])
"""


@pytest.mark.feature(
    "Checkpoints", "`validate` and `test` with `ckpt_path` in a fresh process", "the same metrics to the bit"
)
@pytest.mark.parametrize(
    "which, how, python", [("hawq", "validate", new_python), ("install", "test", python)], ids=["new", "fork"]
)
def test_a_fresh_process_rebuilds_the_quantized_network(tmp_path, undisturbed, which, how, python):
    folder, final = undisturbed
    out = python(CHECK, folder, which, how, tmp_path / "out.pt", cwd=ROOT)
    assert out.returncode == 0, out.stderr[-2000:]
    told = torch.load(tmp_path / "out.pt", weights_only=True)
    assert_mixed_elsewhere(told["bits"])
    found = told["found"]
    assert found == {k: v.item() for k, v in final["metrics"].items() if k in found} and len(found) == 2


@pytest.mark.feature("Checkpoints", "`predict` with `ckpt_path`", "works")
def test_predict_from_a_checkpoint(undisturbed, tmp_path):
    class Predicts(Classifier):
        def predict_step(self, batch):
            return self(batch[0])

    model = Predicts()
    out = trainer(tmp_path, hawq()).predict(model, loader(shuffle=False), ckpt_path=str(undisturbed[0] / "last.ckpt"))
    assert_mixed(model)
    twin = load_from_checkpoint(Classifier, undisturbed[0] / "last.ckpt").eval()
    with torch.no_grad():
        assert all(torch.equal(o, twin(b[0])) for o, b in zip(out, loader(shuffle=False)))


# ------------------------------------------------------------ load_from_checkpoint


class OwnLoad(Classifier):
    def load_state_dict(self, state_dict, strict=True, assign=False):
        self.visited = True
        return super().load_state_dict(state_dict, strict, assign)


class OwnHook(Classifier):
    def on_load_checkpoint(self, checkpoint):
        self.visited = True


class Late(Classifier):
    def __init__(self, width=16):
        super().__init__(width)
        self.made, self.net = self.net, None

    def configure_model(self):
        if self.net is None:
            self.net, self.made = self.made, None
        self.visited = True


@pytest.mark.feature(
    "Checkpoints", "`load_from_checkpoint` without a Trainer", "works with `hawq_lightning.load_from_checkpoint`"
)
@pytest.mark.parametrize("kind", [Classifier, OwnLoad, OwnHook, Late])
def test_load_from_checkpoint_without_a_trainer(undisturbed, kind):
    path = undisturbed[0] / "last.ckpt"
    model = load_from_checkpoint(kind, path, strict=True)
    assert_mixed(model)
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in undisturbed[1]["state"].items())
    assert kind is Classifier or model.visited
    assert ("load_state_dict" in kind.__dict__) == (kind is OwnLoad)


def test_a_loaded_module_needs_no_callback_to_test(undisturbed, tmp_path):
    model = load_from_checkpoint(Classifier, undisturbed[0] / "last.ckpt")
    found = trainer(tmp_path).test(model, loader(shuffle=False))[0]
    assert found["val_loss"] == undisturbed[1]["metrics"]["val_loss"].item()


def test_strict_loading_stays_strict(undisturbed, tmp_path):
    path = undisturbed[0] / "last.ckpt"
    with pytest.raises(RuntimeError, match="Unexpected key"):
        Classifier.load_from_checkpoint(path)
    with pytest.raises(RuntimeError, match="Unexpected key"):
        trainer(tmp_path).test(Classifier(), loader(), ckpt_path=str(path))
    content = torch.load(path, weights_only=True)
    content["state_dict"].pop("net.0.bias")
    torch.save(content, tmp_path / "cut.ckpt")
    with pytest.raises(RuntimeError, match=r"Missing key.*net\.0\.bias"):
        load_from_checkpoint(Classifier, tmp_path / "cut.ckpt")
    content["state_dict"]["net.0.bias"] = torch.zeros(16)
    content["state_dict"].pop("net.0.weight_quantizer.scale")
    torch.save(content, tmp_path / "cut.ckpt")
    with pytest.raises(RuntimeError, match=r"Missing key.*net\.0\.weight_quantizer\.scale"):
        load_from_checkpoint(Classifier, tmp_path / "cut.ckpt")


def test_checkpoints_load_with_weights_only(undisturbed):
    content = torch.load(undisturbed[0] / "last.ckpt", weights_only=True)
    assert "HAWQ" in content["callbacks"] and content["hawq_lightning_random_states"]["torch"].numel() > 0


# ------------------------------------------------------------ other kinds of checkpoints


@pytest.mark.feature("Checkpoints", "`save_weights_only=True`", "works")
def test_a_weights_only_checkpoint(tmp_path):
    torch.manual_seed(0)
    model, callback = Classifier(), hawq()
    saver = ModelCheckpoint(tmp_path, save_weights_only=True, save_last=True)
    first = trainer(tmp_path, callback, saver, enable_checkpointing=True)
    first.fit(model, loader())
    expected = first.validate(model, loader(shuffle=False))
    other, fresh = Classifier(), hawq()
    found = trainer(tmp_path, fresh).validate(other, loader(shuffle=False), ckpt_path=str(tmp_path / "last.ckpt"))
    assert found == expected
    assert_mixed(other)
    assert enabled_bits(other) == enabled_bits(model) and same_states(model.state_dict(), other.state_dict())
    loaded = load_from_checkpoint(Classifier, tmp_path / "last.ckpt")
    assert enabled_bits(loaded) == enabled_bits(model)


@pytest.fixture
def float_checkpoint(tmp_path):
    torch.manual_seed(0)
    model = Classifier()
    saver = ModelCheckpoint(tmp_path, save_last=True)
    trainer(tmp_path, saver, enable_checkpointing=True, max_epochs=1).fit(model, loader())
    return model, str(tmp_path / "last.ckpt")


@pytest.mark.feature("Checkpoints", "`fit` from a float checkpoint", "resumes, measures, quantizes")
def test_a_float_checkpoint_is_resumed_and_quantized(tmp_path, float_checkpoint):
    model, callback = Classifier(), hawq()
    start = Start()
    trainer(tmp_path, callback, start, max_epochs=2).fit(model, loader(), ckpt_path=float_checkpoint[1])
    assert same_states(start.state, float_checkpoint[0].state_dict())
    assert_mixed(model, callback)


class Start(Callback):
    def on_train_start(self, trainer, pl_module):
        self.state = {k: v.clone() for k, v in pl_module.state_dict().items()}


@pytest.mark.feature("Checkpoints", "float weights loaded into a quantized module", "works; its bits stay")
def test_a_float_checkpoint_does_not_disarm_a_quantized_module(tmp_path, float_checkpoint):
    model, callback = Classifier(), hawq()
    trainer(tmp_path, callback).fit(model, loader())
    before = enabled_bits(model)
    state = torch.load(float_checkpoint[1], weights_only=True)["state_dict"]
    assert not model.load_state_dict(state, strict=False).unexpected_keys
    assert enabled_bits(model) == before
    assert_mixed(model, callback)
    assert same_states(model.state_dict(), state)


@pytest.mark.filterwarnings("ignore:HAWQ. this network is float")  # see test_scores_begin_anew.py
def test_a_float_checkpoint_tests_float(tmp_path, float_checkpoint):
    model = Classifier()
    found = trainer(tmp_path, hawq()).test(model, loader(shuffle=False), ckpt_path=float_checkpoint[1])
    assert found == trainer(tmp_path).test(float_checkpoint[0], loader(shuffle=False))
    assert not enabled_bits(model)


@pytest.mark.feature("Checkpoints", '`ckpt_path="best"`', "works")
def test_best_checkpoint_of_the_same_trainer(tmp_path):
    model, callback = Classifier(), hawq()
    saver = ModelCheckpoint(tmp_path, monitor="val_loss", save_top_k=1)
    t = trainer(tmp_path, callback, saver, enable_checkpointing=True, max_epochs=3)
    t.fit(model, loader(), loader(shuffle=False))
    found = t.validate(model, loader(shuffle=False), ckpt_path="best")[0]
    assert found["val_loss"] == saver.best_model_score.item()
    assert_mixed(model, callback)


# ------------------------------------------------------------ finished work is used again


class Crash(Callback):
    def on_train_start(self, trainer, pl_module):
        raise RuntimeError("out of luck")


@pytest.mark.feature("Restart", "a crash after the measurement", "the traces are used again")
def test_a_crash_after_measuring_does_not_measure_again(tmp_path):
    torch.manual_seed(0)
    float_state = Classifier().state_dict()
    first = Classifier()
    first.load_state_dict(float_state)
    with pytest.raises(RuntimeError, match="out of luck"):
        trainer(tmp_path, hawq(), Crash()).fit(first, loader())
    assert (tmp_path / "sensitivity.json").is_file()

    known = Sensitivity.load(tmp_path / "sensitivity.json").to_dict()
    second, callback = Classifier(), hawq()
    second.load_state_dict(float_state)
    torch.manual_seed(123)  # the sampler must not matter
    trainer(tmp_path, callback).fit(second, loader())
    assert_mixed(second, callback)
    assert callback.sensitivity.to_dict() == known  # down to the seconds that it took
    other, changed = Classifier(), hawq()
    trainer(tmp_path, changed).fit(other, loader())
    assert changed.sensitivity.fingerprint != known["fingerprint"]  # other weights are another measurement
    assert [s.trace for s in changed.sensitivity] != [s["trace"] for s in known["records"]]


@pytest.mark.filterwarnings("ignore:.*measured anew")  # see tests/unit/test_damaged_files.py
@pytest.mark.feature("Restart", "a damaged file of traces in the run folder", "is measured again")
@pytest.mark.parametrize("damage", ["", "{", '{"format": "hawq_lightning.sensitivity", "version": 99}'])
def test_a_damaged_measurement_is_made_again(tmp_path, damage):
    (tmp_path / "sensitivity.json").write_text(damage)
    model, callback = Classifier(), hawq()
    trainer(tmp_path, callback).fit(model, loader())
    assert_mixed(model, callback)


def test_a_checkpoint_of_the_measuring_callback_alone(tmp_path, monkeypatch):
    """MeasureTraces has no state of its own: the file is its memory."""
    measure_callback = measuring()
    trainer(tmp_path, measure_callback).fit(Classifier(), loader())
    model = Classifier()
    trainer(tmp_path, ApplyPlan(tmp_path / "plan.json")).fit(model, loader())
    assert_mixed(model)
    assert enabled_bits(model)


@pytest.mark.filterwarnings("ignore:Be aware that when using .ckpt_path:UserWarning")  # Lightning's, about its savers
def test_a_checkpoint_and_another_plan(tmp_path, undisturbed):
    """The checkpoint's bits stay, with a warning."""
    plan = hawq()
    trainer(tmp_path, plan).fit(Classifier(), loader())
    sites = tuple(
        s if s.kind == "activation" else type(s)(**{**s.__dict__, "bits": 8, "code": "affine"}) for s in plan.plan.sites
    )
    model = Classifier()
    callback = hawq(plan=plan.plan.replace(sites=sites))
    with pytest.warns(UserWarning, match="another plan"):
        trainer(tmp_path, callback, max_epochs=5).fit(model, loader(), ckpt_path=str(undisturbed[0] / "last.ckpt"))
    assert {k: v for k, v in enabled_bits(model).items() if k.endswith("weight")} == {
        s["name"]: s["bits"] for s in undisturbed[1]["plan"]["sites"] if s["kind"] == "weight"
    }
