"""Manual optimization, several optimizers, schedules of the learning rate."""

from __future__ import annotations

import logging
import random

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from torch import nn
from torch.nn import functional as F

from hawq_lightning import HawqError
from hawq_lightning.callbacks import loss_from_training_step
from tests.trainers import FEATURES, Classifier, fit, loader, measuring, same_states, trainer


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)


class Manual(Classifier):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        loss = self.loss(batch)
        self.manual_backward(loss)
        self.clip_gradients(optimizer, 1.0, "norm")
        optimizer.step()
        self.log("loss", loss)


class Gan(LightningModule):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.generator = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, FEATURES))
        self.critic = nn.Sequential(nn.Linear(FEATURES, 16), nn.ReLU(), nn.Linear(16, 1))

    def training_step(self, batch, batch_idx):
        g, d = self.optimizers()
        x = batch[0]
        ones, zeros = torch.ones(len(x), 1), torch.zeros(len(x), 1)
        self.toggle_optimizer(g)
        fake = self.generator(torch.randn(len(x), 6))
        loss = F.binary_cross_entropy_with_logits(self.critic(fake), ones)
        self.manual_backward(loss)
        g.step()
        g.zero_grad()
        self.untoggle_optimizer(g)
        self.toggle_optimizer(d)
        loss = F.binary_cross_entropy_with_logits(self.critic(x), ones)
        loss = loss + F.binary_cross_entropy_with_logits(self.critic(fake.detach()), zeros)
        self.manual_backward(loss)
        d.step()
        d.zero_grad()
        self.untoggle_optimizer(d)

    def configure_optimizers(self):
        return [torch.optim.Adam(self.generator.parameters(), 1e-3), torch.optim.Adam(self.critic.parameters(), 1e-3)]


class Untoggled(Manual):
    """Calls ``loss.backward()`` itself."""

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.loss(batch).backward()
        optimizer.step()


class SharpnessAware(Manual):
    """Goes uphill by the gradients that the first loss left (Foret et al. 2021), and steps by those of the second."""

    def norm(self):
        return torch.stack([p.grad.norm() for p in self.net.parameters() if p.grad is not None]).norm()

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        self.manual_backward(self.loss(batch))
        with torch.no_grad():
            norm, moved = self.norm(), {}
            for p in self.net.parameters():
                moved[p] = p.grad * 0.05 / (norm + 1e-12)
                p.add_(moved[p])
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        with torch.no_grad():
            for p, change in moved.items():
                p.sub_(change)
        optimizer.step()
        optimizer.zero_grad()


class LargestGradient(SharpnessAware):
    def norm(self):
        return max(float(p.grad.abs().max()) for p in self.net.parameters() if p.grad is not None)


class EveryGradient(SharpnessAware):
    def norm(self):
        return sum(p.grad.square().sum() for p in self.net.parameters()).sqrt()


@pytest.mark.feature("Optimizers", "manual optimization, several optimizers (GAN), `loss.backward()` by hand", "works")
@pytest.mark.parametrize("kind", [Manual, Untoggled, Gan, SharpnessAware, LargestGradient, EveryGradient])
def test_manual_optimization(tmp_path, kind):
    model = kind()
    fit(tmp_path, model, loader())
    assert all(p.requires_grad for p in model.parameters())


class ActorCritic(LightningModule):
    """The critic first, on what the actor says without gradients; its target follows it."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.actor = nn.Sequential(nn.Linear(FEATURES, 16), nn.ReLU(), nn.Linear(16, 2))
        self.critic, self.target = (
            nn.Sequential(nn.Linear(FEATURES + 2, 16), nn.ReLU(), nn.Linear(16, 1)) for _ in range(2)
        )

    def training_step(self, batch, batch_idx):
        of_critic, of_actor = self.optimizers()
        x = batch[0]
        with torch.no_grad():
            goal = 1 + 0.9 * self.target(torch.cat([x, self.actor(x)], 1))
        of_critic.zero_grad()
        self.manual_backward(F.mse_loss(self.critic(torch.cat([x, torch.zeros(len(x), 2)], 1)), goal))
        of_critic.step()
        of_actor.zero_grad()
        self.manual_backward(-self.critic(torch.cat([x, self.actor(x)], 1)).mean())
        of_actor.step()

    def configure_optimizers(self):
        return torch.optim.Adam(self.critic.parameters(), 1e-3), torch.optim.Adam(self.actor.parameters(), 1e-3)


def test_a_network_that_a_later_loss_trains_is_no_teacher(tmp_path):
    with pytest.warns(UserWarning, match=r"actor.0.weight \(.*trained by a later loss.*target") as told:
        fit(tmp_path, ActorCritic(), loader(), max_epochs=1)
    (text,) = [str(w.message) for w in told if "stays float" in str(w.message)]
    assert "target.0.weight (896 B; run without gradients, as teachers are)" in text


def test_measuring_takes_no_manual_step(tmp_path):
    results = []
    for name in ("alone", "beside"):
        torch.manual_seed(1)
        model = Gan()
        extra = [measuring()] if name == "beside" else []
        trainer(tmp_path / name, *extra).fit(model, loader())
        results.append(model.state_dict())
    assert extra[0].plan is not None
    assert same_states(*results)


class Parts(Manual):
    """Sends back several losses before it updates: halves of a batch, by one of the ways that people write."""

    def __init__(self, way):
        super().__init__()
        self.way = way

    def halves(self, batch):
        half = len(batch[0]) // 2
        return [self.loss([t[:half] for t in batch]) / 2, self.loss([t[half:] for t in batch]) / 2]

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers(use_pl_optimizer=self.way != "plain optimizer")
        optimizer.zero_grad()
        if self.way == "whole":
            self.manual_backward(self.loss(batch))
        elif self.way == "closure":
            optimizer.step(closure=lambda: [self.manual_backward(x) for x in self.halves(batch)])
            return
        elif self.way == "gradient":
            torch.stack(self.halves(batch)).backward(torch.ones(2))
        else:
            for loss in self.halves(batch):
                loss.backward() if self.way == "backward" else self.manual_backward(loss)
        if self.way == "one optimizer after the other":
            self.untoggle_optimizer(self.optimizers())
            self.manual_backward(100 * self.loss(batch))
        if self.way == "clipped":
            torch.nn.utils.clip_grad_norm_(self.parameters(), 1.0)
        if self.way == "rarely":
            if batch_idx:
                optimizer.step()
            return
        optimizer.step()
        if self.way == "something else later":
            self.manual_backward(100 * self.loss(batch))


WAYS = ("halves", "plain optimizer", "closure", "gradient", "backward", "one optimizer after the other", "clipped",
        "rarely", "something else later")  # fmt: skip


class OneLoss(Callback):
    """The loss that HAWQ takes from a step, at the beginning of the training."""

    def __init__(self, batch):
        self.batch, self.loss = batch, None

    def on_train_start(self, trainer, pl_module):
        pl_module.eval()
        with loss_from_training_step(trainer, pl_module) as loss_fn:
            self.loss = loss_fn(pl_module, self.batch)
            self.gradients = torch.autograd.grad(self.loss, pl_module.net[0].weight)
        pl_module.train()


def one_loss(folder, model):
    found = OneLoss(next(iter(loader(shuffle=False))))
    trainer(folder, found, max_steps=1).fit(model, loader())
    return float(found.loss.detach()), found.gradients[0]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    torch.manual_seed(3)
    return one_loss(tmp_path_factory.mktemp("whole"), Parts("whole"))


@pytest.mark.parametrize("way", WAYS)
def test_losses_that_are_sent_back_before_an_update_add_up(tmp_path, way, whole):
    torch.manual_seed(3)
    loss, gradient = one_loss(tmp_path, Parts(way))
    assert loss == pytest.approx(whole[0], rel=1e-6)
    torch.testing.assert_close(gradient, whole[1])


class Surgery(Manual):
    """Projects one loss's gradients by the other's (Yu et al. 2020)."""

    def training_step(self, batch, batch_idx):
        optimizer, grads = self.optimizers(), []
        for loss in (self.loss(batch), self.loss(batch).square()):
            optimizer.zero_grad()
            self.manual_backward(loss)
            grads.append([p.grad.clone() for p in self.parameters()])
        for p, a, b in zip(self.parameters(), *grads):
            p.grad = a + b
        optimizer.step()


def test_a_step_that_reads_gradients_between_losses_is_told_which_is_measured(tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        fit(tmp_path, Surgery(), loader())
    assert caplog.text.count("Surgery.training_step reads gradients of parameters before its optimizer steps") == 1


class CriticFirst(Gan):
    """The generator's loss is the second that the step sends back."""

    def generator_loss(self, batch):
        fake = self.generator(torch.randn(len(batch[0]), 6))
        return F.binary_cross_entropy_with_logits(self.critic(fake), torch.ones(len(fake), 1))

    def training_step(self, batch, batch_idx):
        g, d = self.optimizers()
        fake = self.generator(torch.randn(len(batch[0]), 6)).detach()
        d.zero_grad()
        self.manual_backward(
            self.critic(fake).mean() - self.critic(batch[0]).mean() + self.critic(fake).square().mean()
        )
        d.step()
        g.zero_grad()
        self.manual_backward(self.generator_loss(batch))
        g.step()


@pytest.mark.filterwarnings("ignore:HAWQ. Much of the network stays float")
def test_the_way_to_a_later_loss_is_told_and_works(tmp_path):
    only = {"exclude": ["critic*"], "input_bits": None}
    with pytest.raises(HawqError, match=r"the first is measured; MeasureConfig\(loss_fn="):
        trainer(tmp_path, measuring(**only)).fit(CriticFirst(), loader())
    model = CriticFirst()
    callback = fit(tmp_path, model, loader(), loss_fn=CriticFirst.generator_loss, **only)
    assert {s.layers[0].split(".")[0] for s in callback.plan.sites} == {"generator"}
