"""Probes in bfloat16: only where they agree with float32."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from hawq_lightning import HawqError, measure


def _batches(images: int = 16):
    g = torch.Generator().manual_seed(0)
    return [(torch.randn(images, 3, 16, 16, generator=g), torch.arange(images) % 10)]


def _loss(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def _net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(200, 10)
    )


def test_bfloat16_traces_agree_and_say_so():
    net = _net()
    plain = {s.name: s for s in measure(net, _batches(), _loss, max_probes=8, rtol=0.01)}
    found = measure(net, _batches(), _loss, max_probes=8, rtol=0.01, precision="bf16")
    assert found.settings["precision"] == "bf16"
    assert any("agreed with float32" in n for n in found.notes)
    for s in found:
        assert s.trace == pytest.approx(plain[s.name].trace, rel=0.05)
    assert any(s.trace != plain[s.name].trace for s in found)  # really other arithmetic


def test_where_bfloat16_disagrees_float32_is_used_and_named():
    net = _net()

    def loss(model, batch):
        images = batch[0]
        if torch.is_autocast_enabled("cpu"):  # as where large numbers cancel
            images = (images + 300.0).bfloat16().float() - 300.0
        return F.cross_entropy(model(images), batch[1])

    plain = measure(net, _batches(), loss, max_probes=8, rtol=0.01)
    found = measure(net, _batches(), loss, max_probes=8, rtol=0.01, precision="bf16")
    assert found.settings["precision"] == "float32"
    assert any("bfloat16 moved the trace of" in n for n in found.notes)
    assert [s.trace for s in found] == [s.trace for s in plain]


def test_unknown_precision_names_the_nearest():
    with pytest.raises(HawqError, match="Unknown precision 'bf61'.*bf16"):
        measure(_net(), _batches(), _loss, precision="bf61")


def test_other_estimators_stay_in_float32():
    found = measure(_net(), _batches(2), _loss, estimator="hutchinson", max_probes=2, precision="bf16")
    assert found.settings["precision"] == "float32"
    assert any("Gauss-Newton probes" in n for n in found.notes)
