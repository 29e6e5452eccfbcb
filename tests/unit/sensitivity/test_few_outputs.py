"""Standard errors of few images with few outputs, traces that are no numbers, a single row, and nothing significant."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from hawq_lightning import HawqError, Sensitivity, measure
from hawq_lightning.sensitivity import SiteTrace, guarded_mean_traces, kinds_in_noise


def net(outputs, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, outputs)).double()


def batch(images, outputs, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(images, 3, dtype=torch.float64, generator=g), torch.randn(
        images, outputs, dtype=torch.float64, generator=g
    )


def squared(model, b):
    return F.mse_loss(model(b[0]), b[1])


def squared_norm_of_the_sum(model, b):
    """Outputs enter by their sum: a quadratic form in signs that is 0 or 1 for most of them."""
    o = model(b[0])
    return o.sum(1).square().mean() + 0.01 * o.square().mean()


@pytest.mark.parametrize("loss_fn", [squared, squared_norm_of_the_sum])
@pytest.mark.parametrize(
    ("images", "outputs"),
    [pytest.param(i, o, marks=[pytest.mark.stress] * (i + o in (3, 5, 6))) for i in (1, 2, 3, 4) for o in (1, 2, 3)],
)
def test_intervals_cover_with_few_outputs(images, outputs, loss_fn):
    hits = total = 0
    for seed in range(4):
        model, b = net(outputs, seed), batch(images, outputs, seed)
        exact = measure(model, [b], loss_fn, estimator="exact", progress=False)
        for r in measure(model, [b], loss_fn, rtol=0.3, seed=seed, progress=False, max_probes=100):
            right = exact[r.name].trace
            hits += abs(r.trace - right) <= 1.96 * r.stderr + 1e-9 * abs(right)
            total += 1
    assert hits >= 0.85 * total  # of one cell; the seeds decide


def test_probes_without_spread_go_on():
    measured = measure(net(1), [batch(15, 1)], squared, progress=False)  # too many to be enumerated
    assert measured.settings["probes"] > 2
    assert all(r.stderr <= 1e-9 * r.trace for r in measured)


class NoSecondDerivative(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * torch.nan


def test_a_loss_with_an_infinite_second_derivative_is_refused():
    with pytest.raises(HawqError, match="second derivative of the loss in the output of"):
        measure(
            net(2), [batch(12, 2)], lambda m, b: (m(b[0]) * 0).abs().sum(1).sqrt().sum() + squared(m, b), progress=False
        )


def test_nan_within_the_network_names_the_site():
    class Bad(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x):
            return self.last(NoSecondDerivative.apply(self.first(x)))

    with pytest.raises(HawqError, match="trace of site 'first.weight' is not finite"):
        measure(Bad().double(), [batch(12, 2)], squared, progress=False)


def record(name, trace, stderr=0.1, kind="weight", numel=10):
    return SiteTrace(name, kind, trace, stderr, stderr, numel, trace / numel)


def test_nan_is_no_trace_to_choose_bits_by():
    good, bad = record("a", 1.0), record("b", math.nan)
    with pytest.raises(HawqError, match="'b' is not a finite number"):
        guarded_mean_traces(Sensitivity((good, bad)))
    with pytest.raises(HawqError, match="'a' is not a finite number"):
        guarded_mean_traces(Sensitivity((good,), rows={"a": [1.0, math.nan]}))


@pytest.mark.parametrize("traces", [(-1.0, -2.0), (0.05, -0.1), (0.0, 0.0), (0.1, 0.15)])
def test_a_kind_without_a_significant_trace_ranks_by_perturbation_alone(traces):
    measured = Sensitivity(
        (record("a", traces[0]), record("b", traces[1], numel=50), record("x", 3.0, kind="activation"))
    )
    means, notes = guarded_mean_traces(measured)
    assert means["a"] == means["b"] > 0 and means["x"] == 0.3
    assert kinds_in_noise(measured) == ("weight",)
    assert len(notes) == 1 and "none is significantly positive" in notes[0]


def test_one_significant_trace_is_enough_to_keep_the_others_apart():
    measured = Sensitivity((record("a", 5.0), record("b", -1.0)))
    means, notes = guarded_mean_traces(measured)
    assert means == {"a": 0.5, "b": 0.5} and not kinds_in_noise(measured)
    assert notes == (
        "1 of 2 weight traces is not significantly positive (b -1 with standard error 0.1): bits are chosen there as "
        "if the mean trace were 0.5.",
    )


def test_many_sites_without_a_significant_trace_take_one_line_a_kind():
    weights = [record(f"w{i}", 0.01 * i) for i in range(58)] + [record("w", 5.0)]
    inputs = [record(f"a{i}", 0.01 * i, kind="activation") for i in range(9)] + [record("a", 3.0, kind="activation")]
    means, notes = guarded_mean_traces(Sensitivity((*weights, *inputs)))
    assert len(notes) == 2 and len(means) == 69
    assert notes[0].startswith("21 of 59 weight traces are not") and "w0 0 with" in notes[0]
    assert "w3" not in notes[0] and "and 18 more)" in notes[0]
    assert notes[1].startswith("9 of 10 activation traces are not")


def test_a_single_batch_says_that_its_sampling_error_is_unknown():
    def coupled(model, b):
        o = model(b[0])
        return F.mse_loss(o, b[1]) + o.mean().square()

    measured = measure(net(3), [batch(12, 3)], coupled, rtol=1.0, progress=False)
    assert all(math.isinf(r.stderr_data) and math.isfinite(r.stderr) for r in measured)
    assert any("one batch of 12 images" in n for n in measured.notes)
    assert Sensitivity.from_dict(measured.to_dict())["0.weight"].stderr_data == math.inf
