"""Optimizers that were made before the quantizers, or from a list: learned steps are trained all the same."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hawq_lightning import load_from_checkpoint
from hawq_lightning.quantization import quantized_layers
from tests.trainers import Classifier, Watch, fit, hawq, loader, trainer


class Early(Classifier):
    """Its optimizer is as old as the module."""

    def __init__(self):
        super().__init__()
        self.optimizer = torch.optim.Adam(self.parameters(), 1e-2)

    def configure_optimizers(self):
        return self.optimizer


class Groups(Classifier):
    """Weights decay, biases do not, and nobody thought of steps; a schedule for each group."""

    def configure_optimizers(self):
        decays = [p for n, p in self.named_parameters() if n.endswith("weight")]
        others = [p for n, p in self.named_parameters() if n.endswith("bias")]
        optimizer = torch.optim.SGD([{"params": decays, "weight_decay": 1e-4}, {"params": others}], 1e-2, momentum=0.9)
        return [optimizer], [torch.optim.lr_scheduler.LambdaLR(optimizer, [lambda e: 1.0, lambda e: 0.5])]


class Two(Classifier):
    """The first layer has an optimizer of its own."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.first, self.rest = list(self.net[0].parameters()), list(self.net[1:].parameters())

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        self.manual_backward(loss)
        for optimizer in self.optimizers():
            optimizer.step()
            optimizer.zero_grad()

    def configure_optimizers(self):
        return [torch.optim.Adam(self.first, 1e-2), torch.optim.Adam(self.rest, 1e-2)]


def steps_of(module):
    return {n: p.detach().clone() for n, p in module.named_parameters() if n.rpartition(".")[2] in ("step", "alpha")}


@pytest.mark.parametrize(("kind", "quantizer"), [(Early, "lsq"), (Groups, "pact"), (Two, "lsq")])
def test_learned_steps_are_trained(tmp_path, kind, quantizer):
    torch.manual_seed(0)
    model, watch = kind(), Watch(lambda t, m: steps_of(m))
    t = trainer(tmp_path, hawq(quantizer=quantizer, activation_bits=4), watch, max_epochs=1)
    t.fit(model, loader())
    assert watch.seen[0] and all(not torch.equal(v, steps_of(model)[n]) for n, v in watch.seen[0].items() if "0." in n)
    held = [id(p) for o in t.optimizers for g in o.param_groups for p in g["params"]]
    assert len(held) == len(set(held)) and {id(p) for p in model.parameters()} <= set(held)
    t.save_checkpoint(tmp_path / "one.ckpt")
    again = kind()
    trainer(tmp_path, hawq(quantizer=quantizer, activation_bits=4), max_epochs=2).fit(
        again, loader(), ckpt_path=tmp_path / "one.ckpt"
    )
    assert load_from_checkpoint(kind, tmp_path / "one.ckpt")


def test_parameters_made_anew_are_told(tmp_path):
    class Renewed(Early):
        def on_fit_start(self):
            self.net[-1].weight = nn.Parameter(self.net[-1].weight.detach().clone())

    model = Renewed()
    with pytest.warns(UserWarning, match="net.6.weight is in no optimizer"):
        trainer(tmp_path, hawq()).fit(model, loader())
    assert quantized_layers(model)


def test_a_part_that_is_not_trained_is_not_told(tmp_path, recwarn):
    class HeadOnly(Classifier):
        def configure_optimizers(self):
            return torch.optim.Adam(self.net[-1].parameters(), 1e-2)

    fit(tmp_path, HeadOnly(), loader(), quantizer="lsq")
    assert not [w for w in recwarn if "optimizer" in str(w.message)]
