"""Peak activation memory from a watched forward pass, against figures by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hawq_lightning import Candidate, HawqError, sites
from hawq_lightning.selection import Problem, activation_steps, select
from tests.trainers import Classifier, hawq, loader, trainer


class Residual(nn.Module):
    def __init__(self, inplace):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 1)
        self.a, self.b = nn.Conv2d(4, 8, 1), nn.Conv2d(8, 4, 1)
        self.norm, self.relu = nn.BatchNorm2d(8), nn.ReLU(inplace)
        self.head = nn.Linear(4, 5)

    def forward(self, x):
        x = self.relu(self.stem(x))
        y = self.relu(self.norm(self.a(x)))
        x = self.relu(x + self.b(y))
        return self.head(x.mean((2, 3)))


@pytest.mark.parametrize("inplace", [False, True])
def test_a_residual_network_step_by_step(inplace):
    model, batch = Residual(inplace).train(), torch.randn(2, 3, 6, 6)
    table = sites(model, batch)
    steps = activation_steps(model, batch, table)
    assert model.training and len(steps) == 4
    assert steps[0] == {"stem.input": 3 * 36, "float32": 4 * 36}  # stem's output is also the skip
    assert steps[1] == {"float32": 4 * 36, "b.input": 8 * 36}
    assert steps[2] == {"float32": 4 * 36, "b.input": 8 * 36, "head.input": 4}
    assert steps[3] == {"head.input": 4}


def test_a_chain_needs_input_and_output_at_their_own_bits():
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.ReLU(), nn.Conv2d(2, 3, 1), nn.Flatten(), nn.Linear(48, 2))
    batch = torch.randn(5, 1, 4, 4)
    table = sites(model, batch)
    steps = activation_steps(model, batch, table)
    assert steps == [{"0.input": 16, "2.input": 32}, {"2.input": 32, "4.input": 48}, {"4.input": 48}]
    options = {s.name: [Candidate(b, "affine", 4.0**-b * s.numel, 1.0) for b in (2, 4, 8)] for s in table}
    plan = select(Problem(table, options, steps=steps), {"act_peak": "32B"})
    assert (
        max(
            16 * plan.bits["0.input"] + 32 * plan.bits["2.input"], 32 * plan.bits["2.input"] + 48 * plan.bits["4.input"]
        )
        <= 256
    )
    assert plan.costs["act_peak_bytes"] <= 32


def test_percent_is_of_the_8_bit_network():
    """What waits for an addition stays float32, also there."""
    model, batch = Residual(False).eval(), torch.randn(2, 3, 6, 6)
    table = sites(model, batch)
    steps = activation_steps(model, batch, table)
    options = {s.name: [Candidate(b, "affine", 4.0**-b * s.numel, 1.0) for b in (4, 8)] for s in table}
    plan = select(Problem(table, options, steps=steps), {"act_peak": "100%"})
    assert {s.bits for s in plan.activations} == {8}
    assert plan.costs["act_peak_bytes"] == 4 * 36 * 4 + 8 * 36 + 4
    less = select(Problem(table, options, steps=steps), {"act_peak": "90%"})
    assert less.costs["act_peak_bytes"] <= 0.9 * plan.costs["act_peak_bytes"]


def test_the_callback_finds_the_steps_itself(tmp_path):
    torch.manual_seed(0)
    free = hawq(activation_bits=(4, 8), input_bits=None)
    trainer(tmp_path, free).fit(Classifier(), loader())
    tight = hawq(activation_bits=(4, 8), input_bits=None, budget={"weights": "9x", "act_peak": "60%"})
    trainer(tmp_path, tight).fit(Classifier(), loader())
    assert tight.plan.costs["act_peak_bytes"] > 0
    assert sum(s.bits for s in tight.plan.activations) < sum(s.bits for s in free.plan.activations)


def test_the_callback_finds_them_where_the_loss_needs_training_mode(tmp_path):
    class Fussy(Classifier):  # as torchvision's detectors
        def training_step(self, batch, batch_idx):
            assert self.training
            return super().training_step(batch, batch_idx)

    callback = hawq(activation_bits=(4, 8), budget={"weights": "9x", "act_peak": "100%"})
    trainer(tmp_path, callback).fit(Fussy(), loader())
    assert callback.plan.costs["act_peak_bytes"] > 0


def test_another_models_table_is_refused():
    model = nn.Sequential(nn.Linear(3, 3))
    table = sites(model, torch.randn(2, 3))
    with pytest.raises(HawqError, match="none of the layers"):
        activation_steps(nn.Linear(3, 3), torch.randn(2, 3), table)
