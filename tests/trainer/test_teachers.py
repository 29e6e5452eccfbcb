"""Teachers and generators in a Trainer: the optimizers tell what is trained."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from hawq_lightning import QuantizerConfig
from hawq_lightning.quantization import enabled_bits
from tests.trainers import Classifier, fit, loader, mlp


class Distilled(Classifier):
    """The teacher is called with gradients on; only the optimizer tells that it is none of the network."""

    def __init__(self, detach=False):
        super().__init__()
        self.teacher, self.detach = mlp(), detach

    def loss(self, batch):
        x, y = batch
        target = self.teacher(x).softmax(1)
        out = self.net(x)
        divergence = F.kl_div(out.log_softmax(1), target.detach() if self.detach else target, reduction="batchmean")
        return F.cross_entropy(out, y) + divergence

    def configure_optimizers(self):
        return torch.optim.Adam(self.net.parameters(), 1e-3)


class EveryParameter(Distilled):
    """Its optimizer holds the teacher too, which gets no gradient."""

    def __init__(self):
        super().__init__(detach=True)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 1e-3)


@pytest.mark.filterwarnings("ignore:HAWQ. Much of the network stays float")  # the teacher
@pytest.mark.parametrize("kind", [Distilled, EveryParameter])
def test_a_teacher_with_gradients_stays_as_it_is(tmp_path, kind):
    torch.manual_seed(0)
    model = kind()
    before = [p.clone() for p in model.teacher.parameters()]
    callback = fit(tmp_path, model, loader())
    assert enabled_bits(model) and all(name.startswith("net.") for name in enabled_bits(model))
    assert not any("teacher" in n for s in callback.plan.sites for n in s.layers)
    assert all(torch.equal(a, b) for a, b in zip(before, model.teacher.parameters(), strict=True))


def test_a_teacher_is_quantized_on_request(tmp_path):
    torch.manual_seed(0)
    model = Distilled()
    fit(tmp_path, model, loader(), quantizer=QuantizerConfig(include=["net.*", "teacher.*"]))
    assert {n.split(".")[0] for n in enabled_bits(model)} == {"net", "teacher"}
