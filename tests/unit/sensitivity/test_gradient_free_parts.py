"""Teachers, targets made without gradients, tensors of inference mode."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import hawq_lightning as hl
from hawq_lightning.quantization import enabled_bits
from tests.small_network import cross_entropy
from tests.trainers import Classifier, fit, loader, mlp


class Distilled(Classifier):
    """A frozen teacher beside the student, as in knowledge distillation."""

    def __init__(self):
        super().__init__()
        self.teacher = mlp().eval().requires_grad_(False)

    def loss(self, batch):
        with torch.no_grad():
            target = self.teacher(batch[0]).softmax(1)
        return F.kl_div(self.net(batch[0]).log_softmax(1), target, reduction="batchmean")


def test_a_teacher_stays_float(tmp_path):
    model = Distilled()
    with pytest.warns(UserWarning, match=r"teacher.4.weight \(1.5 KiB; run without gradients, as teachers are\)"):
        callback = fit(tmp_path, model, loader())
    assert enabled_bits(model) and all(name.startswith("net.") for name in enabled_bits(model))
    reasons = {f.name: f.reason for f in callback.sites.floats}
    assert reasons["teacher.0"] == "run without gradients, as teachers are"
    assert not any(p.requires_grad for p in model.teacher.parameters()) and model.net[0].weight.requires_grad


def test_one_layer_with_and_without_gradients():
    """Self-supervision: the target comes from the same layers."""
    x, y = torch.randn(8, 5), torch.randint(0, 3, (8,))
    model = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3))

    def loss(module, batch):
        with torch.no_grad():
            target = module(batch[0].flip(1)).softmax(1)
        return F.cross_entropy(module(batch[0]), target)

    traces = hl.measure(model, [(x, y)], loss, estimator="exact", progress=False)
    fixed = model(x.flip(1)).softmax(1).detach()
    expected = hl.measure(
        model, [(x, y)], lambda m, b: F.cross_entropy(m(b[0]), fixed), estimator="exact", progress=False
    )
    assert [r.name for r in traces] == [r.name for r in expected]
    for a, b in zip(traces, expected, strict=True):
        assert a.trace == pytest.approx(b.trace, rel=1e-5)


def test_tensors_of_inference_mode_can_be_measured():
    with torch.inference_mode():
        batch = torch.randn(8, 12), torch.randint(0, 4, (8,))
    traces = hl.measure(mlp(), [batch], cross_entropy, progress=False, rtol=0.5)
    assert all(r.trace > 0 for r in traces) and len(traces.records) == len(hl.sites(mlp(), batch))
