"""When ranges are set, frozen and estimated again in training, and what a restart keeps of it."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from hawq_lightning import FreezeSchedule
from tests.trainers import Classifier, Watch, hawq, loader, steps_of, trainer


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def test_ranges_frozen_before_they_exist_are_those_of_arming(tmp_path):
    watch = Watch(lambda t, m: (t.current_epoch, steps_of(m)))
    trainer(tmp_path, hawq(quantizer="lsq", start_epoch=1), FreezeSchedule(ranges=0), watch, max_epochs=2).fit(
        Classifier(), loader()
    )
    late = [s for epoch, s in watch.seen if epoch == 1]
    assert all(s == late[0] for s in late) and all(0 < v < 0.9 for v in late[0])


def test_re_estimated_ranges_survive_a_restart_and_count_optimizer_steps(tmp_path):
    def run(folder, epochs, **kwargs):
        torch.manual_seed(0)
        model = Classifier()
        moved = Watch(lambda t, m: steps_of(m))
        callback = hawq(options={"reestimate": 3})
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
