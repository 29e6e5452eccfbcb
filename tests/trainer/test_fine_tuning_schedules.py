"""BatchNorm and ranges freeze by schedule; quantizers are switched on in the order of Omega."""

import itertools

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import nn

from hawq_lightning import HawqError
from hawq_lightning.callbacks import ApplyPlan, BlockwiseOrder, FreezeSchedule
from hawq_lightning.quantization import quantizers
from tests.trainers import Classifier, assert_mixed, hawq, loader, trainer


class Watch(Callback):
    """What every batch of training and every validation saw."""

    def __init__(self):
        self.means, self.working, self.validated, self.scales = [], [], [], []

    def on_train_batch_end(self, trainer, pl_module, *args):
        norm = next(m for m in pl_module.modules() if isinstance(m, nn.BatchNorm1d))
        self.means.append(norm.running_mean.clone())
        self.working.append([n for n, q in named(pl_module).items() if q.bits and not q.fake_quant_disabled])

    def on_validation_batch_start(self, trainer, pl_module, *args):
        self.validated.append(sum(1 for q in quantizers(pl_module) if q.bits and not q.fake_quant_disabled))


def named(model):
    return {n: m for n, m in model.named_modules() if n.endswith("_quantizer")}


def moved(values):
    return [not torch.equal(a, b) for a, b in itertools.pairwise(values)]


@pytest.mark.parametrize("moment, first", [(1, 4), (0.5, 4), ("75%", 6), (0, 0)])
def test_batchnorm_statistics_stop_at_their_moment(tmp_path, moment, first):
    watch, model = Watch(), Classifier()
    t = trainer(tmp_path, hawq(), FreezeSchedule(batchnorm=moment), watch, max_epochs=2)
    before = model.net[1].running_mean.clone()
    t.fit(model, loader(), loader(shuffle=False))  # 4 batches an epoch
    assert moved([before, *watch.means]) == [True] * first + [False] * (8 - first)
    assert model.net[1].training  # as the user had it


def test_a_module_that_calls_train_itself_stays_frozen(tmp_path):
    class Restless(Classifier):
        def on_train_epoch_start(self):
            self.train()

    watch = Watch()
    trainer(tmp_path, hawq(), FreezeSchedule(batchnorm=0), watch, max_epochs=2).fit(Restless(), loader())
    assert moved(watch.means) == [False] * 7


def test_share_needs_an_end(tmp_path):
    schedule = FreezeSchedule(batchnorm=0.5)
    with pytest.raises(HawqError, match=r"FreezeSchedule\(batchnorm=0.5\) is a share.* which has no known end"):
        trainer(tmp_path, hawq(), schedule, max_epochs=-1, limit_train_batches=1).fit(Classifier(), loader())


@pytest.mark.parametrize("bad", [-1, 1.5, "soon", "x%", True, [1]])
def test_bad_moments(bad):
    with pytest.raises(HawqError, match=r"FreezeSchedule\(batchnorm=.*no moment of training"):
        FreezeSchedule(batchnorm=bad)


def test_max_steps_is_an_end(tmp_path):
    watch, model = Watch(), Classifier()
    trainer(tmp_path, hawq(), FreezeSchedule(batchnorm=0.5), watch, max_epochs=-1, max_steps=6).fit(model, loader())
    assert moved(watch.means) == [True, True, False, False, False]


def test_learned_parameters_of_quantizers_are_put_back(tmp_path):
    class Learns(Classifier):
        """A quantizer with a parameter that momentum keeps moving."""

        def __init__(self):
            super().__init__()
            self.extra = nn.Parameter(torch.ones(()))

        def on_fit_start(self):
            quantizers(self)[0].register_parameter("learned", self.extra)

        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) + self.extra

    seen = []

    class Look(Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            seen.append(float(pl_module.extra.detach()))

        def on_train_batch_start(self, trainer, pl_module, *args):
            assert all(q.range_updates_enabled == (trainer.current_epoch < 1) for q in quantizers(pl_module))

    model = Learns()
    trainer(tmp_path, hawq(), FreezeSchedule(ranges=1), Look(), max_epochs=2).fit(model, loader())
    assert len(set(seen[:4])) == 4 and set(seen[4:]) == {seen[3]}
    assert all(q.range_updates_enabled for q in quantizers(model))


# ------------------------------------------------------------ order


def groups_of(callback):
    ranked = sorted(callback.plan.sites, key=lambda s: (s.omega, s.name), reverse=True)
    return [s.name for s in ranked]


def test_quantizers_start_in_the_order_of_omega(tmp_path):
    watch, model, callback = Watch(), Classifier(), hawq()
    t = trainer(tmp_path, callback, BlockwiseOrder(until=0.5), watch, max_epochs=4, num_sanity_val_steps=1)
    t.fit(model, loader(), loader(shuffle=False))
    counts = [len(w) for w in watch.working]
    assert counts[0] == 1 and counts[-1] == 6 and counts == sorted(counts) and len(set(counts)) > 3
    assert counts[8] == 6  # half of 16 batches
    first = groups_of(callback)[0]
    layer, part = first.rsplit(".", 1)
    assert watch.working[0] == [f"{layer}.{part}_quantizer"]
    assert set(watch.validated) == {6}  # validation sees the whole plan
    assert not any(q.fake_quant_disabled for q in quantizers(model))
    assert_mixed(model, callback)


def test_ascending_is_the_reverse(tmp_path):
    watch, callback = Watch(), hawq()
    trainer(tmp_path, callback, BlockwiseOrder("omega_ascending"), watch, max_epochs=2).fit(Classifier(), loader())
    layer, part = groups_of(callback)[-1].rsplit(".", 1)
    assert watch.working[0] == [f"{layer}.{part}_quantizer"]


def test_the_order_goes_on_after_a_resume(tmp_path):
    whole, model = Watch(), Classifier()
    torch.manual_seed(3)
    saver = ModelCheckpoint(tmp_path, save_top_k=-1, filename="{epoch}")
    settings = {"max_epochs": 4, "enable_checkpointing": True}
    trainer(tmp_path, hawq(), BlockwiseOrder(until="75%"), whole, saver, **settings).fit(model, loader())
    second = Watch()
    t = trainer(tmp_path, hawq(), BlockwiseOrder(until="75%"), second, max_epochs=4)
    t.fit(Classifier(), loader(), ckpt_path=tmp_path / "epoch=1.ckpt")
    assert second.working == whole.working[8:]


def test_an_exception_leaves_everything_on(tmp_path):
    class Stop(Callback):
        def on_train_batch_end(self, *args):
            raise ValueError("stop")

    model = Classifier()
    with pytest.raises(ValueError, match="stop"):
        trainer(tmp_path, hawq(), BlockwiseOrder(), Stop(), max_epochs=2).fit(model, loader())
    assert not any(q.fake_quant_disabled for q in quantizers(model))


def test_training_that_ends_early_says_so(tmp_path):
    class Stop(Callback):
        def on_train_batch_end(self, trainer, *args):
            trainer.should_stop = True

    model = Classifier()
    with pytest.warns(UserWarning, match="never trained with"):
        trainer(tmp_path, hawq(), BlockwiseOrder(), Stop(), max_epochs=4, min_epochs=0).fit(model, loader())
    assert not any(q.fake_quant_disabled for q in quantizers(model))


def test_bad_orders(tmp_path):
    with pytest.raises(HawqError, match="Unknown order 'omga'.*omega"):
        BlockwiseOrder(by="omga")
    with pytest.raises(HawqError, match="stages is 0"):
        BlockwiseOrder(stages=0)
    callback, model = hawq(), Classifier()
    trainer(tmp_path, callback).fit(model, loader())
    bare = callback.plan.replace(sites=tuple(s.__class__(**{**vars(s), "omega": None}) for s in callback.plan.sites))
    with pytest.raises(HawqError, match="sorts by Omega, which the plan lacks"):
        trainer(tmp_path, ApplyPlan(bare), BlockwiseOrder()).fit(Classifier(), loader())
