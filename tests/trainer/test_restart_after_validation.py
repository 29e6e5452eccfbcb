"""Checkpoints that ModelCheckpoint writes at the end of validation: resumed, the next epoch has the same batches."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch import Callback, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint

from hawq_lightning.callbacks.fault_tolerance import KeepRandomStates
from tests.trainers import Classifier, assert_mixed, hawq, loader, trainer


class Batches(Callback):
    def __init__(self):
        self.seen = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.seen.append((trainer.current_epoch, batch_idx, batch[0].sum().item()))

    def on_train_epoch_end(self, trainer, pl_module):
        torch.rand(3)  # what a user's callback draws counts as in an undisturbed run


def run(folder, make, ckpt=None, **settings):
    seed_everything(7 if ckpt is None else 8, verbose=False)
    callback, batches, net = make(), Batches(), Classifier()
    saver = ModelCheckpoint(folder, "{epoch}", save_top_k=-1, save_on_train_epoch_end=False, **settings)
    t = trainer(folder, callback, saver, batches, max_epochs=3, enable_checkpointing=True)
    t.fit(net, loader(), loader(shuffle=False), ckpt_path=ckpt)
    return callback, net, batches.seen


def check(tmp_path, make, **settings):
    callback, net, seen = run(tmp_path, make, **settings)
    again, resumed, seen_again = run(tmp_path / "b", make, tmp_path / "epoch=0.ckpt", **settings)
    assert seen_again == [row for row in seen if row[0] > 0]
    for name, value in net.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    return callback, again, resumed


@pytest.mark.feature(
    "Restart",
    "`ModelCheckpoint(save_on_train_epoch_end=False)`: resumed from the end of validation",
    "the same batches in the same order, the same weights to the bit",
)
@pytest.mark.filterwarnings("ignore:The dirpath has changed")
@pytest.mark.parametrize(("start_epoch", "settings"), [(0, {}), (0, {"monitor": "val_loss"}), (1, {})])
def test_the_next_epoch_has_the_same_batches(tmp_path, start_epoch, settings):
    callback, again, resumed = check(tmp_path, lambda: hawq(start_epoch=start_epoch), **settings)
    assert_mixed(resumed, again)
    assert again.plan.bits == callback.plan.bits


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_so_it_has_in_a_training_without_a_plan(tmp_path):
    check(tmp_path, KeepRandomStates)
