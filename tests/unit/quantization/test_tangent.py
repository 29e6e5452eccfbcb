"""The tangent of the distance near the network of the lowest widths: plans of few bits, told apart where they are."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from hawq_lightning import HawqError, candidates, forecast, quantize, select, sites
from hawq_lightning.quantization import Forecast, rounding_errors
from hawq_lightning.selection import Problem

POINT = {"fast": 2 / 3, "accurate": 0.5 + 0.05**0.5}


def loss_fn(model: nn.Module, batch) -> torch.Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def kl(then: torch.Tensor, now: torch.Tensor) -> torch.Tensor:
    p, q = then.log_softmax(1), now.log_softmax(1)
    return (p.exp() * (p - q)).sum(1).mean()


def data(dtype=torch.float32, counts=(48, 80)):
    g = torch.Generator().manual_seed(1)
    return [(torch.randn(n, 8, generator=g).to(dtype), torch.arange(n) % 4) for n in counts]


def fragile(depth: int = 3, seed: int = 0) -> nn.Sequential:
    """Sure of its classes, with BatchNorm's statistics of the float network: two bits leave nothing of it."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for k in range(depth):
        layers += [nn.Linear(8 if k == 0 else 24, 24, bias=False), nn.BatchNorm1d(24, momentum=None), nn.ReLU()]
    net = nn.Sequential(*layers, nn.Linear(24, 4))
    with torch.no_grad():
        net[-1].weight.mul_(8)
        net(data()[1][0])
    return net.eval()


@pytest.mark.parametrize("mode", ["fast", "accurate"])
def test_weights_slopes_are_derivatives_at_the_point(mode):
    net, batches = fragile().double(), data(torch.float64)
    table = sites(net, batches[0][0])
    weighed = candidates(net, batches, None, table, loss_fn, weight_bits=(2, 3, 8), activation_bits=None)
    made = forecast(net, batches, loss_fn, table, weighed, mode=mode)
    errors = {n: of.whole() for n, of in rounding_errors(net, weighed, table).weights.items()}
    place = {n: [c.bits for c in weighed[n]] for n in weighed}
    then, t = [net(x).detach() for x, _ in batches], POINT[mode]

    @torch.no_grad()
    def distance(site: str = "", bits: int = 2, step: float = 0.0) -> float:
        moved = copy.deepcopy(net)
        for n, weight in moved.named_parameters():
            if n in errors:
                weight.add_(t * errors[n][0] + (step * errors[n][place[n].index(bits)] if n == site else 0))
        total = sum(len(x) for x, _ in batches)
        return sum(float(kl(a, moved(x))) * len(x) for a, (x, _) in zip(then, batches)) / total

    assert made.tangent is not None and made.tangent.end == made.measured_uniform[2]
    along = 0.0
    for name in errors:
        for bits in (2, 3, 8):
            slope = (distance(name, bits, 1e-5) - distance(name, bits, -1e-5)) / 2e-5
            assert made.slope(name, bits) == pytest.approx(slope, rel=1e-4, abs=1e-6), (name, bits)
            along += slope if bits == 2 else 0.0
    assert made.tangent.level == pytest.approx(distance() - t * along, rel=1e-4)
    assert made.tangent.at_end == pytest.approx(distance() + (1 - t) * along, rel=1e-4)


def test_activations_slopes_are_derivatives_at_the_point():
    net, batches = fragile(seed=1).double(), data(torch.float64)
    table = sites(net, batches[0][0])
    site_of = {s.layers[0]: s.name for s in table.activations}
    weighed = candidates(net, batches, None, table, loss_fn, weight_bits=(2, 4), activation_bits=(2, 4), input_bits=8)
    made = forecast(net, batches, loss_fn, table, weighed)
    assert made.tangent is not None
    t, then = POINT["fast"], [net(x).detach() for x, _ in batches]
    moved = copy.deepcopy(net)
    with torch.no_grad():
        for n, of in rounding_errors(net, weighed, table).weights.items():
            moved.get_parameter(n).add_(t * of.whole()[0])

    def error(x: torch.Tensor, site: str, bits: int) -> torch.Tensor:
        c = next((c for c in weighed[site] if c.bits == bits), weighed[site][0])
        codes = (x.float() / c.scale).round().add(c.zero_point).clamp(0, 2**c.bits - 1)
        return ((codes - c.zero_point) * c.scale).double() - x

    @torch.no_grad()
    def distance(bits: int, step: float) -> float:
        """With the errors of the last layer's input at ``bits`` besides."""
        found = 0.0
        for a, (x, _) in zip(then, batches):
            for name, module in moved.named_children():
                if name in site_of:
                    extra = step * error(x, site_of[name], bits) if name == "9" else 0
                    x = x + t * error(x, site_of[name], 2) + extra
                x = module(x)
            found += float(kl(a, x)) * len(x)
        return found / sum(len(x) for x, _ in batches)

    for bits in (2, 4):
        slope = (distance(bits, 1e-4) - distance(bits, -1e-4)) / 2e-4
        assert made.slope(site_of["9"], bits) == pytest.approx(slope, rel=1e-3, abs=1e-5), bits
    assert set(made.tangent.slopes[site_of["0"]]) == {8}


def test_there_is_none_where_the_distance_bends_upwards():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 24), nn.Tanh(), nn.Linear(24, 4)).eval()
    batches = data()
    table = sites(net, batches[0][0])
    weighed = candidates(net, batches, None, table, loss_fn, weight_bits=(4, 8), activation_bits=None)
    made = forecast(net, batches, loss_fn, table, weighed)
    assert made.tangent is None and made.slope("0.weight", 4) == 0.0
    assert made.of(dict.fromkeys(weighed, 4)) == pytest.approx(made.forecast_uniform[4])


def test_there_is_none_with_batchnorm_measured_again():
    net, batches = fragile(), data()
    table = sites(net, batches[0][0])
    weighed = candidates(net, batches, None, table, loss_fn, weight_bits=(2, 8), activation_bits=(2, 8))
    assert forecast(net, batches, loss_fn, table, weighed, after="batchnorm").tangent is None


def test_the_two_are_mixed_by_how_far_shares_go():
    net, batches = fragile(), data()
    table = sites(net, batches[0][0])
    weighed = candidates(net, batches, None, table, loss_fn, weight_bits=(2, 4, 8), activation_bits=None)
    made = forecast(net, batches, loss_fn, table, weighed)
    state = copy.deepcopy(net.state_dict())
    assert all(torch.equal(v, state[n]) for n, v in net.state_dict().items())
    tangent = made.tangent
    assert tangent is not None
    for bits in (
        dict.fromkeys(weighed, 2),
        dict.fromkeys(weighed, 8),
        {n: (2, 4)[k % 2] for k, n in enumerate(weighed)},
    ):
        p = sum(made.share(n, b) for n, b in bits.items())
        q = tangent.level + sum(made.slope(n, b) for n, b in bits.items())
        near = min(max(p / tangent.end, 0), 1)
        assert made.of(bits) == pytest.approx((1 - near) * p + near * q)
        assert made.error(bits) >= near * abs(tangent.at_end - tangent.end)
    quantize(net, select(Problem(table, weighed), None, "manual", bits=dict.fromkeys(weighed, 8)))
    assert made.of(dict.fromkeys(weighed, 8)) < 0.01


def test_it_is_saved_and_what_is_damaged_is_refused(tmp_path):
    net, batches = fragile(), data()
    table = sites(net, batches[0][0])
    weighed = candidates(net, batches, None, table, loss_fn, weight_bits=(2, 8), activation_bits=None)
    made = forecast(net, batches, loss_fn, table, weighed)
    made.save(tmp_path / "forecast.json")
    assert made.tangent is not None and Forecast.load(tmp_path / "forecast.json") == made
    for spoiled, match in (({"end": 0}, "end of the tangent"), ({"level": "x"}, "level"), ({"slopes": 3}, "slopes")):
        saved = json.loads(json.dumps(made.to_dict()))
        saved["tangent"].update(spoiled)
        with pytest.raises(HawqError, match=match):
            Forecast.from_dict(saved)
    old = {k: v for k, v in made.to_dict().items() if k != "tangent"}
    assert Forecast.from_dict(old).tangent is None
    with pytest.raises(HawqError, match="3 bits, but at 2, 8"):
        made.slope("0.weight", 3)
