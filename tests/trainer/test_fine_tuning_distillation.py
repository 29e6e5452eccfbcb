"""Distillation: right distance for each loss, the float network as teacher, neutral to checkpoints and random draws."""

import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import nn
from torch.nn import functional as F

from hawq_lightning import Distillation, FreezeSchedule, HawqError
from hawq_lightning.quantization import GraphOutputs, Head, distance, enabled_bits, find_heads
from tests.cases import ConvNet, SharedHead, _detector, build, image_batch
from tests.trainers import Classifier, Watch, hawq, loader, trainer


def heads_of(loss_of, net=None, batch=None):
    net, batch = net or build(ConvNet), batch or image_batch()
    with GraphOutputs(net) as outputs:
        loss = loss_of(net, batch)
    return [(h.name, h.distance, h.axis) for h in find_heads(loss, outputs)]


@pytest.mark.parametrize(
    "loss, expected",
    [
        (lambda m, b: F.cross_entropy(m(b[0]), b[1]), ("kl", 1)),
        (lambda m, b: F.cross_entropy(m(b[0]), b[1], label_smoothing=0.1), ("kl", 1)),
        (lambda m, b: F.nll_loss(F.log_softmax(m(b[0]), -1), b[1]), ("kl", 1)),
        (lambda m, b: (torch.softmax(m(b[0]) / 2, -1) - 0.1).square().sum(), ("kl", 1)),
        (lambda m, b: F.mse_loss(m(b[0]), F.one_hot(b[1], 3).double()), ("mse", None)),
        (
            lambda m, b: F.binary_cross_entropy_with_logits(m(b[0]), F.one_hot(b[1], 3).double()),
            ("mse", None),
        ),
    ],
)
def test_the_loss_decides_the_distance(loss, expected):
    assert heads_of(loss) == [("fc", *expected)]


def test_a_loss_module_with_parameters_is_no_head():
    class Tempered(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))

        def forward(self, logits, target):
            return F.cross_entropy(self.scale * logits, target)

    net = build(ConvNet)
    net.loss = Tempered()
    assert heads_of(lambda m, b: 0.5 * m.loss(m(b[0]), b[1]), net) == [("fc", "kl", 1)]


def test_a_detector_has_its_heads():
    net = build(SharedHead)
    found = heads_of(_detector, net, image_batch())
    assert {n for n, _, _ in found} == {"score", "box"} and {d for _, d, _ in found} == {"mse"}


def test_logits_that_were_reshaped():
    net = nn.Conv2d(2, 5, 1).double()

    def loss(m, b):
        return F.cross_entropy(m(b[0]).permute(0, 2, 3, 1).reshape(-1, 5), torch.zeros(256, dtype=torch.long))

    wrapped = nn.Sequential(net)
    assert heads_of(loss, wrapped) == [("0", "kl", 1)]
    dense = heads_of(lambda m, b: F.cross_entropy(m(b[0]), torch.zeros(4, 8, 8, dtype=torch.long)), wrapped)
    assert dense == [("0", "kl", 1)]


def test_distances_by_hand():
    s = torch.tensor([[1.0, 2.0], [0.0, 0.0]], requires_grad=True)
    t = torch.tensor([[0.0, 1.0], [2.0, 0.0]])
    p = torch.softmax(t / 2, 1)
    expected = 4 * (p * (p.log() - torch.softmax(s / 2, 1).log())).sum(1).mean()
    kl = distance([Head("a", 1)], {"a": [s]}, {"a": [t]}, temperature=2.0)
    assert torch.allclose(kl, expected)
    levels = distance([Head("a", 1)], {"a": [s[:1], s[1:]]}, {"a": [t[:1], t[1:]]}, temperature=2.0)
    assert torch.allclose(levels, expected)
    mse = distance([Head("a", None)], {"a": [s]}, {"a": [t]})
    assert torch.allclose(mse, ((s - t) ** 2).mean() / t.var(correction=0))
    assert float(distance([Head("a", 1)], {"a": [t]}, {"a": [t]})) == pytest.approx(0, abs=1e-6)
    assert torch.isfinite(distance([Head("a", None)], {"a": [s]}, {"a": [torch.zeros(2, 2)]}))
    (slope,) = torch.autograd.grad(kl, s)
    assert torch.allclose(slope, (torch.softmax(s / 2, 1) - p) * 2 / 2, atol=1e-6)  # T^2 keeps gradients of one size


class Plain(Classifier):
    """Without dropout, so that two runs draw alike."""

    def __init__(self):
        super().__init__()
        self.net[3] = nn.Identity()


class Losses(Callback):
    def __init__(self):
        self.total, self.own, self.states = [], [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.total += [float(outputs["loss"])] if outputs else []
        self.states.append(torch.get_rng_state())


def fitted(folder, model=None, weight=None):
    """Two epochs, with a teacher if its ``weight`` is given."""
    torch.manual_seed(1)
    model, losses, callback = model or Plain(), Losses(), None if weight is None else Distillation(weight)
    t = trainer(folder, hawq(), *([] if callback is None else [callback]), losses, max_epochs=2)
    t.fit(model, loader())
    return model, callback, losses, t


def test_the_term_is_in_the_loss_and_logged(tmp_path):
    _, _, plain, _ = fitted(tmp_path)
    model, callback, losses, t = fitted(tmp_path, weight=2.0)
    assert [(h.name, h.distance) for h in callback.heads] == [("net.6", "kl")]
    assert losses.total[0] > plain.total[0] + 1e-4
    teacher = callback._teacher
    assert not enabled_bits(teacher) and not any("quantizer" in k for k in teacher.state_dict())
    assert "train/distillation" in t.logged_metrics
    assert "training_step" not in model.__dict__ and not any("teacher" in k for k in model.state_dict())
    assert not any(p is q for p in model.parameters() for q in teacher.parameters())
    spawned = pickle.loads(pickle.dumps(callback))
    assert all(torch.equal(v, spawned._saved[k]) for k, v in teacher.state_dict().items())


def test_the_first_term_is_the_distance_to_the_float_network(tmp_path):
    seen = {}

    class Compare(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if not seen:
                teacher = callback._teacher
                with torch.no_grad():
                    student = pl_module.train()(batch[0])
                    pl_module.net[1].reset_running_stats()
                    seen["by_hand"] = distance(
                        [Head("a", 1)], {"a": [student]}, {"a": [teacher(batch[0])]}, temperature=4.0
                    )
                    seen["own"] = F.cross_entropy(student, batch[1])

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            seen.setdefault("total", outputs["loss"])

    torch.manual_seed(0)
    callback = Distillation(3.0)
    trainer(tmp_path, hawq(), callback, Compare()).fit(Plain(), loader())
    assert torch.allclose(seen["total"], seen["own"] + 3.0 * seen["by_hand"], atol=1e-6)


def test_random_draws_are_those_without_a_teacher(tmp_path):
    class Draws(Classifier):
        """Augments inside of the step."""

        drawn = ()

        def training_step(self, batch, batch_idx):
            noise = 0.1 * torch.randn_like(batch[0])
            self.drawn = (*self.drawn, float(noise.sum()))
            return F.cross_entropy(self(batch[0] + noise), batch[1])

    torch.manual_seed(0)
    one = fitted(tmp_path, Draws(), weight=1.0)
    torch.manual_seed(0)
    two = fitted(tmp_path, Draws())
    assert one[0].drawn == two[0].drawn  # the student's
    assert all(torch.equal(a, b) for a, b in zip(one[2].states, two[2].states))
    # the teacher's are the student's, too; it keeps its own attributes
    assert one[1]._teacher.drawn == one[0].drawn


def test_dict_outputs_skipped_batches_and_outputs_overwritten(tmp_path):
    class Awkward(Plain):
        def training_step(self, batch, batch_idx):
            if batch_idx == 1:
                return None
            return {"loss": F.cross_entropy(self(batch[0]).mul_(2.0), batch[1]), "extra": 1}

    _, callback, _losses, t = fitted(tmp_path, Awkward(), weight=1.0)
    assert callback._copy and "train/distillation" in t.logged_metrics


def test_distillation_pulls_to_the_teacher(tmp_path):
    class Still(Plain):
        """Its own loss hardly pulls."""

        def training_step(self, batch, batch_idx):
            return 1e-6 * F.cross_entropy(self(batch[0]), batch[1])

    torch.manual_seed(0)
    losses, model = Losses(), Still()
    callbacks = hawq(budget="14x"), Distillation(1.0), FreezeSchedule(batchnorm=0)
    trainer(tmp_path, *callbacks, losses, max_epochs=12).fit(model, loader())
    assert sum(losses.total[-4:]) < 0.5 * sum(losses.total[:4])


def test_resume_has_the_same_teacher_and_weights(tmp_path):
    saver = ModelCheckpoint(tmp_path, save_top_k=-1, filename="{epoch}")
    torch.manual_seed(1)
    model, callback = Plain(), Distillation()
    settings = {"max_epochs": 3, "enable_checkpointing": True}
    trainer(tmp_path, hawq(), callback, saver, **settings).fit(model, loader(shuffle=False))
    path = tmp_path / "epoch=0.ckpt"
    assert not any("teacher" in k for k in torch.load(path, weights_only=True)["state_dict"])
    again, second = Plain(), Distillation()
    trainer(tmp_path, hawq(), second, max_epochs=3).fit(again, loader(shuffle=False), ckpt_path=path)
    mine, theirs = callback._teacher, second._teacher
    assert all(torch.equal(v, theirs.state_dict()[k]) for k, v in mine.state_dict().items())
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in model.state_dict().items())
    # a Trainer without distillation takes the checkpoint, too
    trainer(tmp_path, hawq()).test(Plain(), loader(shuffle=False), ckpt_path=path, verbose=False)


def test_start_later_distils_from_the_network_trained_by_then(tmp_path):
    kept = {}

    class Keep(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            kept[trainer.current_epoch] = pl_module.net[0].weight.detach().clone()

    callback, model = Distillation(), Plain()
    trainer(tmp_path, hawq(start_epoch=1), callback, Keep(), max_epochs=2).fit(model, loader())
    assert torch.equal(callback._teacher.net[0].weight, kept[0])


def test_refused(tmp_path):
    class ByHand(Plain):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            loss = self.loss(batch)
            self.manual_backward(loss)

    with pytest.raises(HawqError, match="ByHand optimizes by hand"):
        fitted(tmp_path, ByHand(), weight=1.0)
    for bad in (-1, float("nan"), "much", True):
        with pytest.raises(HawqError, match="Distillation.weight="):
            Distillation(bad)
    with pytest.raises(HawqError, match="Distillation.temperature=0"):
        Distillation(1.0, 0)


DDP = """
import sys, torch
torch.set_num_threads(1)
from lightning.pytorch import seed_everything
from hawq_lightning import BlockwiseOrder, Distillation, FreezeSchedule
from tests.trainers import *
seed_everything(5, verbose=False)
model, companions = Classifier(), [Distillation(), FreezeSchedule(0.5), BlockwiseOrder()]
t = trainer(sys.argv[1], hawq(), *companions, strategy="ddp", devices=2, max_epochs=2)
t.fit(model, loader(8))
torch.save({"state": model.state_dict(), "distilled": t.logged_metrics["train/distillation"]},
           f"{sys.argv[1]}/rank{t.global_rank}.pt")
"""


@pytest.mark.stress
def test_two_processes(tmp_path):
    script = tmp_path / "run.py"
    script.write_text(DDP)
    root = Path(__file__).parent.parent.parent
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path)], cwd=root, capture_output=True, text=True, timeout=150,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    first, second = (torch.load(tmp_path / f"rank{r}.pt", weights_only=True) for r in (0, 1))
    assert float(first["distilled"]) > 0
    assert all(torch.equal(v, second["state"][k]) for k, v in first["state"].items() if "running" not in k)


@pytest.mark.filterwarnings("ignore:HAWQ. training goes on in the middle of epoch:UserWarning")
def test_a_fit_that_goes_on_within_an_epoch_distils_at_once(tmp_path):
    keep = ModelCheckpoint(tmp_path / "c", every_n_train_steps=2, save_top_k=-1)
    saving = {"enable_checkpointing": True}
    trainer(tmp_path, hawq(), Distillation(), keep, max_epochs=2, max_steps=3, **saving).fit(Classifier(), loader())
    (middle,) = (tmp_path / "c").glob("*step=2*")
    watch = Watch(lambda t, m: "train/distillation" in t.callback_metrics)
    trainer(tmp_path, hawq(), Distillation(), watch, max_epochs=1).fit(Classifier(), loader(), ckpt_path=middle)
    assert watch.seen and all(watch.seen)
