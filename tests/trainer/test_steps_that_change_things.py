"""Training steps that change their batch or the model, or go back by hand: measured as a step that does not."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from hawq_lightning import HAWQ, HawqError, MeasureConfig, candidates, load_from_checkpoint, measure, sites
from hawq_lightning.sensitivity import repeatable

FEW = MeasureConfig(max_probes=4)  # what is compared is exact by probe


class Net(LightningModule):
    def __init__(self, form: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.form = form
        self.automatic_optimization = not form.startswith("manual")
        self.net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
        self.teacher = copy.deepcopy(self.net).requires_grad_(False)
        for p in self.teacher.parameters():
            p.data.mul_(2)
        self.register_buffer("queue", torch.zeros(3))
        self.seen: list[torch.Tensor] = []

    def training_step(self, batch, i):
        x, y = batch
        form = self.form
        if form == "div_":
            x = x.div_(255)
        elif form == "slice":
            x[:] = x / 255
        elif form == "list":
            batch[0] = x = x / 255
        elif form == "pop":
            y, x = batch.pop(), batch.pop() / 255
        else:
            x = x / 255
        if "adversarial" in form:
            x = self.adversarial(x, y)
        loss = F.cross_entropy(self.net(x), y)
        if form == "teacher":
            loss = loss + F.mse_loss(self.net(x), self.teacher(x))
            for t, s in zip(self.teacher.parameters(), self.net.parameters()):
                t.data = t.data * 0.5 + s.data * 0.5
        elif form == "teacher in place":
            loss = loss + F.mse_loss(self.net(x), self.teacher(x))
            with torch.no_grad():
                for t, s in zip(self.teacher.parameters(), self.net.parameters()):
                    t.mul_(0.5).add_(s, alpha=0.5)
        elif form == "fixed teacher":
            loss = loss + F.mse_loss(self.net(x), self.teacher(x))
        elif form == "queue":
            loss = loss * (1 + self.queue.sum())
            self.queue += 1
        elif form == "backward":
            loss.backward()
            return None
        if not self.automatic_optimization:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
        return loss

    def adversarial(self, x, y):
        """By gradients of the inputs, which a loss of its own is sent back for."""
        x = x.clone().requires_grad_()
        loss = F.cross_entropy(self.net(x), y)
        if self.form == "adversarial by autograd.grad":
            (slope,) = torch.autograd.grad(loss, x)
        else:
            self.manual_backward(loss) if "manual_backward" in self.form else loss.backward()
            slope = x.grad
        return (x + 0.1 * slope.sign()).detach()

    def configure_optimizers(self):
        return torch.optim.SGD(self.net.parameters(), 0.0)


class Kept(HAWQ):
    def on_train_start(self, trainer, module):
        super().on_train_start(trainer, module)
        self.state_at_start = {n: v.clone() for n, v in module.state_dict().items()}


def rows() -> DataLoader:
    g = torch.Generator().manual_seed(0)
    return DataLoader([(torch.rand(6, generator=g) * 255, i % 3) for i in range(32)], 8)


def run(form: str, tmp_path) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    hawq = Kept(weight_bits=(2, 4, 8), budget="9x", progress=False, dirpath=tmp_path / form, measure=FEW)
    trainer = Trainer(
        max_steps=1, callbacks=[hawq], logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, accelerator="cpu", default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(Net(form), rows())
    return {r.name: r.trace for r in hawq.sensitivity}, hawq.state_at_start


@pytest.mark.parametrize(
    "form, plain",
    [
        ("div_", "copy"), ("slice", "copy"), ("list", "copy"), ("pop", "copy"), ("queue", "copy"),
        ("teacher", "fixed teacher"), ("teacher in place", "fixed teacher"),
        ("adversarial", "adversarial by autograd.grad"), ("manual adversarial", "adversarial by autograd.grad"),
        ("manual adversarial by manual_backward", "adversarial by autograd.grad"),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:HAWQ. Much of the network stays float")
def test_a_step_that_changes_things_is_measured_as_one_that_does_not(form, plain, tmp_path):
    got, state = run(form, tmp_path)
    expected, _ = run(plain, tmp_path)
    assert got == pytest.approx(expected, rel=1e-5)
    fresh = Net(form).state_dict()
    for name, value in fresh.items():
        assert torch.equal(state[name], value), f"{name} had moved before the first step"


@pytest.mark.filterwarnings("ignore:.*returned `None`")  # Lightning says it once a process
@pytest.mark.filterwarnings("ignore:HAWQ. Much of the network stays float")
def test_a_step_that_goes_back_by_hand_is_measured(tmp_path):
    net = Net("backward")
    hawq = HAWQ(weight_bits=(2, 4, 8), budget="9x", progress=False, dirpath=tmp_path, measure=FEW)
    trainer = Trainer(
        max_epochs=1, limit_train_batches=1, callbacks=[hawq], logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, accelerator="cpu", default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(net, rows())
    expected, _ = run("copy", tmp_path)
    assert {r.name: r.trace for r in hawq.sensitivity} == pytest.approx(expected, rel=1e-5)


@pytest.mark.filterwarnings("ignore:HAWQ. Much of the network stays float")  # the teacher
@pytest.mark.parametrize("detached", [False, True])
def test_a_teacher_that_moves_before_its_use(tmp_path, detached):
    class Moving(Net):
        def training_step(self, batch, i):
            for t, s in zip(self.teacher.parameters(), self.net.parameters(), strict=True):
                t.data = t.data * 0.9 + s.data * 0.1
            target = self.teacher(batch[0])
            return F.mse_loss(self.net(batch[0]), target.detach() if detached else target)

    net = Moving("copy")
    before = [p.clone() for p in net.teacher.parameters()]
    after: list[bool] = []

    class Look(Callback):
        def on_train_start(self, trainer, pl_module):
            after.append(all(map(torch.equal, before, pl_module.teacher.parameters())))

    hawq = HAWQ(budget="8x", progress=False, dirpath=tmp_path)
    trainer = Trainer(
        max_epochs=1, limit_train_batches=1, callbacks=[hawq, Look()], logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, accelerator="cpu", default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(net, rows())
    assert after == [True]
    assert all(n.startswith("net.") for s in hawq.plan.sites for n in s.layers)


def test_gradients_of_what_the_network_makes():
    def retains(m: nn.Module, b: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        h = m[0](b[0])
        h.retain_grad()
        loss = F.cross_entropy(m[2](m[1](h)), b[1])
        loss.backward(retain_graph=True)
        return loss * (1 + h.grad.norm())

    torch.manual_seed(0)
    net, batch = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)), (torch.randn(8, 4), torch.arange(8) % 3)
    factor = float((retains(net, batch) / F.cross_entropy(net(batch[0]), batch[1])).detach())
    net.zero_grad()
    plain = measure(net, [batch], lambda m, b: F.cross_entropy(m(b[0]), b[1]), estimator="exact", progress=False)
    table = sites(net, batch)
    for record in measure(net, [batch], retains, estimator="exact", sites=table, progress=False):
        assert record.trace == pytest.approx(factor * plain[record.name].trace, rel=1e-4)
    traces = measure(net, [batch], retains, estimator="exact", progress=False)
    with pytest.raises(HawqError, match="asks for gradients of what the network makes"), torch.no_grad():
        repeatable(net, retains)(net, batch)
    assert {c.bits for c in candidates(net, [batch], traces, table, retains)["0.weight"]} == {2, 4, 8}


def test_a_teacher_that_gradients_pass_through_may_move_after_its_use():
    def loss_fn(move: bool):
        def loss(m: nn.Module, b: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
            total = F.cross_entropy(m.net(b[0]), b[1]) + torch.tanh(m.old(m.net(b[0]))).square().mean()
            if move:
                with torch.no_grad():
                    m.old.weight.mul_(0.5)
                    m.old.bias.data.add_(1.0)
            return total

        return loss

    torch.manual_seed(0)
    net = nn.Module()
    net.net, net.old = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)), nn.Linear(3, 3)
    batch = torch.randn(8, 4), torch.arange(8) % 3
    for estimator in ("ggn", "hutchinson"):
        got, expected = (
            measure(net, [batch], loss_fn(m), progress=False, estimator=estimator, max_probes=8) for m in (True, False)
        )
        assert [r.trace for r in got] == pytest.approx([r.trace for r in expected], rel=1e-4)


def test_a_plain_loss_may_change_its_batch_and_a_teacher():
    def in_place(m: nn.Module, b: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        m.old.weight.mul_(0.5)
        return F.cross_entropy(m.net(b[0].mul_(0.1)), b[1]) + m.old.weight.square().sum() * m.net(b[0]).square().mean()

    def copied(m: nn.Module, b: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        x = b[0] * 0.1
        return F.cross_entropy(m.net(x), b[1]) + (0.5 * m.old.weight).square().sum() * m.net(x).square().mean()

    torch.manual_seed(0)
    net = nn.Module()
    net.net, net.old = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)), nn.BatchNorm1d(3)
    batch, before = (torch.randn(8, 4), torch.arange(8) % 3), net.old.weight.detach().clone()
    x = batch[0].clone()
    got = measure(net, [batch], in_place, progress=False, seed=1)
    expected = measure(net, [batch], copied, progress=False, seed=1)
    assert [r.trace for r in got] == pytest.approx([r.trace for r in expected], rel=1e-4)
    assert torch.equal(batch[0], x) and torch.equal(net.old.weight, before)


class Shared(LightningModule):
    """A layer that is registered under three names."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(6, 6)
        self.a, self.b = nn.Sequential(self.stem, nn.Linear(6, 3)), nn.ModuleDict({"x": self.stem})

    def training_step(self, batch, i):
        return F.cross_entropy(self.a(torch.relu(self.b["x"](batch[0]))), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.01)


def test_a_layer_under_several_names_is_loaded_from_a_checkpoint(tmp_path):
    net = Shared()
    trainer = Trainer(
        max_steps=1, callbacks=[HAWQ(budget="9x", progress=False, dirpath=tmp_path)], logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, accelerator="cpu",
        default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(net, rows())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    again = load_from_checkpoint(Shared, tmp_path / "a.ckpt")
    batch = next(iter(rows()))
    assert torch.equal(again.eval().training_step(batch, 0), net.eval().training_step(batch, 0))
    assert again.b["x"] is again.stem


@pytest.mark.filterwarnings("ignore:HAWQ. Much of the network stays float")  # the teacher
@pytest.mark.parametrize("how", ["length", "batches", "attribute", "in_place"])
def test_a_schedule_that_asks_the_trainer_for_its_loader(tmp_path, how):
    class Scheduled(Net):
        def training_step(self, batch, i):
            x = batch[0].mul_(0.5) if how == "in_place" else batch[0] * 0.5
            loader = self.trainer.train_dataloader
            steps = {"batches": lambda: self.trainer.num_training_batches, "attribute": lambda: len(loader.dataset)}
            share = self.trainer.global_step / steps.get(how, lambda: len(loader))()
            return F.cross_entropy(self.net(x), batch[1]) * (1 + share)

    traces = {}
    for kind in (Scheduled, Net):
        torch.manual_seed(0)
        hawq = HAWQ(budget="9x", progress=False, dirpath=tmp_path / kind.__name__, measure=FEW)
        if kind is Net:
            hawq = HAWQ(budget="9x", progress=False, dirpath=tmp_path / "net", measure=replace(FEW, loss_fn=_halved))
        trainer = Trainer(
            max_epochs=1, limit_train_batches=2, callbacks=[hawq], logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, accelerator="cpu", default_root_dir=tmp_path,
        )  # fmt: skip
        trainer.fit(kind("copy"), rows())
        traces[kind] = {r.name: r.trace for r in hawq.sensitivity}
    assert traces[Scheduled] == traces[Net]


def _halved(module, batch):
    return F.cross_entropy(module.net(batch[0] * 0.5), batch[1])
