"""Stopped in the middle of an epoch, or by SLURM's notice: what goes on is what would have been."""

import os
import signal
import stat
import warnings

import pytest
import torch
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.plugins.environments import SLURMEnvironment
from torch.utils.data import DataLoader

from hawq_lightning import HawqError
from hawq_lightning.callbacks import AtomicCheckpointIO, in_middle_of_epoch
from tests.internals import internal
from tests.trainers import FEATURES, Augmented, Classifier, assert_mixed, hawq, loader, trainer

# Lightning's word on the savers of the run before
OTHER_SAVERS = pytest.mark.filterwarnings("ignore:Be aware that when using .ckpt_path:UserWarning")


class Noisy(Augmented):
    """Augmented by torch's random numbers; the network has dropout, which draws as well."""

    def __getitem__(self, i):
        x, y = self.rows[i]
        return x + 0.1 * torch.randn(FEATURES), y


def stateful():
    loaders = pytest.importorskip("torchdata.stateful_dataloader")
    return loaders.StatefulDataLoader(Noisy(), 8, shuffle=True)  # 8 batches an epoch


class Stop(Exception):
    """The end of a process, for the purposes of a test."""


class At(Callback):
    """Does something after a batch."""

    def __init__(self, epoch, batch, what):
        self.at, self.what = (epoch, batch), what

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if (trainer.current_epoch, batch_idx) == self.at:
            self.what()


def stop():
    raise Stop


def run(folder, data, *callbacks, seed=7, ckpt=None, **settings):
    seed_everything(seed, verbose=False)
    model, callback = Classifier(), hawq()
    fitting = trainer(folder, callback, *callbacks, max_epochs=2, **settings)
    fitting.fit(model, data(), ckpt_path=ckpt)  # made after seeding: its sampler draws a seed of its own
    assert_mixed(model, callback)
    return model, callback


def saver(folder):
    return ModelCheckpoint(folder, every_n_train_steps=5, save_top_k=-1)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    return run(tmp_path_factory.mktemp("undisturbed"), stateful)


def same(model, callback, other):
    assert callback.plan.to_dict()["sites"] == other[1].plan.to_dict()["sites"]
    assert all(torch.equal(v, other[0].state_dict()[k]) for k, v in model.state_dict().items())


@pytest.mark.feature(
    "Restart",
    "stopped in the middle of an epoch, resumed there, with torchdata's StatefulDataLoader",
    "the same plan and weights to the bit, with dropout and augmentation",
)
@pytest.mark.parametrize("epoch, step", [(0, 5), (1, 10)])
def test_the_middle_of_an_epoch(tmp_path, undisturbed, epoch, step):
    with pytest.raises(Stop):
        run(tmp_path, stateful, saver(tmp_path), At(epoch, step - 8 * epoch, stop), enable_checkpointing=True)
    path = tmp_path / f"epoch={epoch}-step={step}.ckpt"
    assert in_middle_of_epoch(torch.load(path, weights_only=True))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="HAWQ")
        model, callback = run(tmp_path, stateful, seed=8, ckpt=str(path))
    same(model, callback, undisturbed)


@pytest.mark.feature(
    "Restart",
    "stopped in the middle of an epoch, with a loader that does not keep its position",
    "the same plan; a warning names the reason why the weights differ",
)
@OTHER_SAVERS
def test_a_loader_without_a_position_is_told(tmp_path):
    def data():
        return DataLoader(Noisy(), 8, shuffle=True)

    with pytest.raises(Stop):
        run(tmp_path, data, saver(tmp_path), At(0, 5, stop), enable_checkpointing=True)
    with pytest.warns(UserWarning, match=r"middle of epoch 0.*DataLoader cannot tell where.*StatefulDataLoader"):
        run(tmp_path, data, seed=8, ckpt=str(tmp_path / "epoch=0-step=5.ckpt"))


@OTHER_SAVERS
def test_a_checkpoint_without_random_states_is_told(tmp_path):
    with pytest.raises(Stop):
        run(tmp_path, stateful, saver(tmp_path), At(0, 5, stop), enable_checkpointing=True)
    path = tmp_path / "epoch=0-step=5.ckpt"
    content = torch.load(path, weights_only=True)
    del content["hawq_lightning_random_states"]
    torch.save(content, path)
    with pytest.warns(UserWarning, match=r"middle of epoch 0.*no random states"):
        run(tmp_path, stateful, seed=8, ckpt=str(path))


# ------------------------------------------------------------ SLURM


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """One task of a job, and an ``scontrol`` that writes down what it is asked for."""
    folder = tmp_path / "bin"
    folder.mkdir()
    command = folder / "scontrol"
    command.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\n')
    command.chmod(command.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    known = {"JOB_ID": "42", "JOB_NAME": "train", "NTASKS": "1", "NTASKS_PER_NODE": "1", "PROCID": "0", "LOCALID": "0",
             "NODEID": "0", "NNODES": "1", "NODELIST": "localhost"}  # fmt: skip
    for key, value in known.items():
        monkeypatch.setenv(f"SLURM_{key}", value)
    before = signal.getsignal(signal.SIGUSR1)
    yield {"plugins": [SLURMEnvironment(auto_requeue=True, requeue_signal=signal.SIGUSR1)]}
    assert signal.getsignal(signal.SIGUSR1) == before


def notice():
    os.kill(os.getpid(), signal.SIGUSR1)


@pytest.mark.feature(
    "Restart",
    "SLURM's notice (SIGUSR1) in the middle of an epoch, requeued",
    "the same plan and weights to the bit; nothing is measured again",
)
def test_requeued_in_the_middle_of_an_epoch(tmp_path, slurm, undisturbed, monkeypatch):
    with pytest.raises(Stop):
        run(tmp_path, stateful, At(1, 3, notice), At(1, 4, stop), **slurm)
    assert (tmp_path / "asked").read_text() == "requeue 42\n"
    monkeypatch.setattr("hawq_lightning.callbacks._measure.measure", lambda *a, **k: pytest.fail("measured again"))
    assert (tmp_path / "hpc_ckpt_1.ckpt").is_file()  # which Lightning looks for by itself
    model, callback = run(tmp_path, stateful, seed=8, **slurm)
    same(model, callback, undisturbed)


class Crash(Callback):
    def on_train_start(self, trainer, pl_module):
        raise Stop


@pytest.mark.feature(
    "Restart",
    "SLURM's notice while traces are measured",
    "the module is put back before the checkpoint is written; the requeued job goes on to the same plan and weights",
)
@pytest.mark.parametrize("call", [1, 12, 40])
def test_requeued_while_measuring(tmp_path, slurm, undisturbed, monkeypatch, call):
    internals = internal("callbacks._trainer._training_step_loss")

    calls, original = [], internals._loss

    def noticed(*args):
        calls.append(args)
        if len(calls) == call:
            notice()
        return original(*args)

    monkeypatch.setattr(internals, "_loss", noticed)
    seed_everything(7, verbose=False)
    model = Classifier()
    float_state = {k: v.clone() for k, v in model.state_dict().items()}
    callback = hawq(loss_per_site=True)
    with pytest.raises(Stop):
        trainer(tmp_path, callback, Crash(), max_epochs=2, **slurm).fit(model, stateful())
    assert len(calls) > call
    saved = torch.load(tmp_path / "hpc_ckpt_1.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(v, saved[k]) for k, v in float_state.items())
    assert all(float(v) == 0 for k, v in saved.items() if k.endswith("_quantizer.num_bits"))  # nothing was enabled yet
    monkeypatch.setattr(internals, "_loss", original)
    same(*run(tmp_path, stateful, **slurm), undisturbed)


def test_sigterm_while_measuring_ends_the_run(tmp_path, monkeypatch):
    internals = internal("callbacks._trainer._training_step_loss")

    calls, original = [], internals._loss

    def noticed(*args):
        calls.append(args)
        if len(calls) == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*args)

    monkeypatch.setattr(internals, "_loss", noticed)
    model = Classifier()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises((SystemExit, Exception)) as ended:
        trainer(tmp_path, hawq()).fit(model, loader())
    assert "SIGTERM" in type(ended.value).__name__ or isinstance(ended.value, SystemExit)
    assert len(calls) == 5
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in before.items())


# ------------------------------------------------------------ checkpoints


@pytest.mark.feature(
    "Restart",
    "checkpoints cut short by a crash where the temporary folder is another file system",
    "`plugins=[AtomicCheckpointIO()]` writes beside the checkpoint; the command line does so itself",
)
def test_a_checkpoint_is_the_old_one_or_the_new_one(tmp_path, monkeypatch):
    model, callback = run(tmp_path, loader, plugins=[AtomicCheckpointIO()])
    path = tmp_path / "last.ckpt"
    model.trainer.save_checkpoint(path)
    old = path.read_bytes()
    assert torch.load(path, weights_only=True)["state_dict"].keys() == model.state_dict().keys()

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(HawqError, match="No space left"):
        model.trainer.save_checkpoint(path)
    assert path.read_bytes() == old and sorted(p.name for p in tmp_path.glob("*last*")) == ["last.ckpt"]
    assert callback.plan is not None
