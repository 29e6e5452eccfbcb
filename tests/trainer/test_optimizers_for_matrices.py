"""Learned steps beside optimizers that refuse some shapes: they go where they are taken, or one sentence says so."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW, Muon, Optimizer

from hawq_lightning import HawqError
from hawq_lightning.quantization import quantized_layers
from tests.trainers import CLASSES, FEATURES, Classifier, hawq, loader, trainer


class Asserts(Optimizer):
    """As those on GitHub are: an assertion, and only when it steps."""

    def __init__(self, params, lr=0.01):
        super().__init__(params, {"lr": lr})

    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    assert p.ndim >= 2
                    p.data.add_(p.grad / p.grad.norm(), alpha=-group["lr"])


class TwoKinds(Optimizer):
    """Matrices in one group, the rest in another, as MuonWithAuxAdam has them."""

    def __init__(self, groups):
        super().__init__(groups, {})

    def step(self, closure=None):
        for group in self.param_groups:
            assert set(group) <= {"params", "lr", "matrices", "initial_lr"}
            for p in group["params"]:
                if p.grad is not None:
                    update = p.grad / torch.linalg.matrix_norm(p.grad) if group["matrices"] else p.grad.sign()
                    p.data.add_(update, alpha=-group["lr"])


class Net(Classifier):
    def __init__(self, make, bias=True):
        super().__init__()
        torch.manual_seed(0)
        self.automatic_optimization = False
        self.make = make
        self.net = nn.Sequential(
            nn.Linear(FEATURES, 16, bias=bias), nn.ReLU(), nn.Linear(16, 16, bias=bias), nn.ReLU(),
            nn.Linear(16, CLASSES, bias=bias),
        )  # fmt: skip

    def training_step(self, batch, batch_idx):
        loss, all_of_them = self.loss(batch), self.optimizers()
        all_of_them = all_of_them if isinstance(all_of_them, list) else [all_of_them]
        for optimizer in all_of_them:
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in all_of_them:
            optimizer.step()

    def configure_optimizers(self):
        layers = [m for m in self.net if isinstance(m, nn.Linear)]
        return self.make([x.weight for x in layers], [x.bias for x in layers if x.bias is not None])


MADE = {
    "muon and adamw": lambda w, b: [Muon(w, 0.01), AdamW(b, 0.01)],
    "adamw and muon": lambda w, b: [AdamW(b, 0.01), Muon(w, 0.01)],
    "muon and a head": lambda w, b: [Muon(w[:2], 0.01), AdamW([*w[2:], *b], 0.01)],
    "assertion": lambda w, b: [Asserts(w), SGD(b, 0.01, momentum=0.9)],
    "groups": lambda w, b: TwoKinds(
        [{"params": w, "lr": 0.01, "matrices": True}, {"params": b, "lr": 0.01, "matrices": False}]
    ),
}


def fit(folder, model, quantizer, **settings):
    callback = hawq(quantizer=quantizer, activation_bits=4, weight_bits=(2, 4, 8))
    t = trainer(folder, callback, **settings)
    t.fit(model, loader())
    return t


def steps_of(model):
    return [
        p for layer in quantized_layers(model).values()
        for q in (layer.weight_quantizer, layer.input_quantizer) for p in q.parameters()
    ]  # fmt: skip


@pytest.mark.parametrize("quantizer", ["lsq", "pact"])
@pytest.mark.parametrize("made", MADE)
def test_steps_go_where_they_are_taken(made, quantizer, tmp_path):
    model = Net(MADE[made])
    t = fit(tmp_path, model, quantizer)
    steps = steps_of(model)
    assert steps
    states = {id(p): g for o in t.optimizers for g in o.param_groups for p in g["params"]}
    assert all(id(p) in states for p in steps)
    assert not any(states[id(p)].get("matrices") for p in steps)
    assert not any(id(p) in map(id, g["params"]) for o in t.optimizers if isinstance(o, Muon | Asserts)
                   for g in o.param_groups for p in steps)  # fmt: skip
    assert all(p.grad is not None for p in steps)


def test_a_resumed_run_puts_them_into_the_same_places(tmp_path):
    t = fit(tmp_path, Net(MADE["muon and adamw"]), "lsq")
    t.save_checkpoint(tmp_path / "one.ckpt")
    model = Net(MADE["muon and adamw"])
    callback = hawq(quantizer="lsq", activation_bits=4, weight_bits=(2, 4, 8))
    again = trainer(tmp_path, callback, max_epochs=2)
    again.fit(model, loader(), ckpt_path=tmp_path / "one.ckpt")
    count = lambda x: [[len(g["params"]) for g in o.param_groups] for o in x.optimizers]  # noqa: E731
    assert count(again) == count(t)


def test_the_nearest_network_takes_them(tmp_path):
    """Two parts, each with an optimizer for matrices and one for the rest."""

    class Parts(Net):
        def __init__(self):
            super().__init__(None, bias=False)
            layers, self.net = [*self.net], nn.Identity()
            self.enc = nn.Sequential(*layers[:2], nn.LayerNorm(16))
            self.dec = nn.Sequential(*layers[2:], nn.LayerNorm(CLASSES))

        def forward(self, x):
            return self.dec(self.enc(x))

        def configure_optimizers(self):
            ps = dict(self.named_parameters())
            part = lambda n, d: [p for k, p in ps.items() if k.startswith(n) and "quantizer" not in k and p.ndim == d]  # noqa: E731
            return [Muon(part("enc", 2)), AdamW(part("dec", 1)), Muon(part("dec", 2)), AdamW(part("enc", 1))]

    model = Parts()
    t = fit(tmp_path, model, "lsq")
    names = {id(p): n for n, p in model.named_parameters()}
    for i, part in ((1, "dec."), (3, "enc.")):
        held = [names[id(p)] for p in t.optimizers[i].param_groups[0]["params"]]
        assert all(n.startswith(part) for n in held)
        assert any("quantizer" in n for n in held)


@pytest.mark.parametrize("kind", [Muon, Asserts])
def test_none_takes_them(kind, tmp_path):
    with pytest.raises(
        HawqError, match=rf"{kind.__name__} takes no learned steps .*'net.0', of shape .*AdamW.*'uniform'"
    ):
        fit(tmp_path, Net(lambda w, b: kind(w, 0.01), bias=False), "lsq")


@pytest.mark.parametrize("kind", [Muon, Asserts])
def test_a_quantizer_without_steps_needs_nothing_of_it(kind, tmp_path):
    fit(tmp_path, Net(lambda w, b: kind(w, 0.01), bias=False), "uniform")


def test_trying_leaves_optimizers_and_random_draws_as_they_are(tmp_path):
    class Noisy(SGD):
        def step(self, closure=None):
            torch.randn(3)
            return super().step()

    class Looks(Net):
        def configure_optimizers(self):
            made = super().configure_optimizers()
            for optimizer in made:
                optimizer.register_step_pre_hook(lambda *a: calls.append(self.global_step))
            self.before = copy.deepcopy([o.state_dict() for o in made])
            return made

        def on_train_start(self):
            self.untouched = calls == [] and all(not o.state for o in self.trainer.optimizers)

    calls: list[int] = []
    model = Looks(lambda w, b: [Muon(w, 0.01), Noisy(b, 0.01, momentum=0.9)])
    torch.manual_seed(3)
    fit(tmp_path, model, "lsq", max_steps=1)
    assert model.untouched
