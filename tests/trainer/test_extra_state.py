"""Modules with extra state of any kind are measured and quantized; only packing refuses what is no tensor."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hawq_lightning import HawqError, load_packed, save_packed
from tests.trainers import Classifier, fit, loader, measuring, trainer


class Extra(nn.Module):
    def __init__(self, state):
        super().__init__()
        self.state = state

    def get_extra_state(self):
        return self.state

    def set_extra_state(self, state):
        self.state = state

    def forward(self, x):
        return x


class WithExtra(Classifier):
    def __init__(self, state):
        super().__init__()
        self.extra = Extra(state)

    def forward(self, x):
        return self.net(self.extra(x))


STATES = {"dict": {"scale": 1.0}, "number": 3, "text": "abc", "list": [torch.ones(2)]}


@pytest.mark.parametrize("kind", STATES)
def test_a_state_that_is_no_tensor_stops_packing_alone(tmp_path, kind):
    measure_callback = measuring()
    trainer(tmp_path / "measure", measure_callback).fit(WithExtra(STATES[kind]), loader())
    assert len(measure_callback.plan.sites) > 0
    model = WithExtra(STATES[kind])
    callback = fit(tmp_path / "hawq", model, loader())
    with pytest.raises(HawqError, match=r"holds 'extra\._extra_state'.*only tensors can be packed"):
        save_packed(model, callback.plan, tmp_path / "model.safetensors")


def test_a_tensor_is_packed(tmp_path):
    model = WithExtra(torch.arange(3.0))
    callback = fit(tmp_path, model, loader())
    save_packed(model, callback.plan, tmp_path / "model.safetensors")
    loaded = WithExtra(torch.zeros(3))
    load_packed(tmp_path / "model.safetensors", loaded)
    assert torch.equal(loaded.extra.state, model.extra.state)
