"""Forecasts of whole plans by path attribution, and the distance to the float network that they are of."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize, prune
from torch.nn.utils import spectral_norm as old_spectral_norm
from torch.nn.utils import weight_norm as old_weight_norm

from hawq_lightning import Candidate, Candidates, HawqError, Plan, candidates, forecast, quantize, sites
from hawq_lightning.quantization import FloatDistance, Forecast, loss_of_plan, rounding_errors, shares_of_plan
from hawq_lightning.quantization.post_training import reestimate_batchnorm
from hawq_lightning.selection import Problem, select

WIDTHS = {"weight_bits": (2, 4, 8), "activation_bits": (4, 8), "input_bits": None}


def network(norm: bool = False) -> nn.Sequential:
    torch.manual_seed(0)
    middle = nn.BatchNorm1d(16) if norm else nn.Identity()
    net = nn.Sequential(nn.Linear(6, 16), middle, nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 4))
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(2)
    if norm:
        net(torch.randn(256, 6))
    return net


def batches(count: int = 2) -> list[tuple[torch.Tensor, torch.Tensor]]:
    g = torch.Generator().manual_seed(1)
    return [(torch.randn(32 * (i + 1), 6, generator=g), torch.arange(32 * (i + 1)) % 4) for i in range(count)]


def classified(model: nn.Module, batch) -> torch.Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def regressed(model: nn.Module, batch) -> torch.Tensor:
    return F.mse_loss(model(batch[0]), F.one_hot(batch[1], 4).float())


def kl(then: torch.Tensor, now: torch.Tensor) -> torch.Tensor:
    p, q = then.log_softmax(1), now.log_softmax(1)
    return (p.exp() * (p - q)).sum(1).mean()


def planned(net: nn.Module, data, loss_fn=classified, bits: dict[str, int] | None = None) -> tuple[Plan, Problem]:
    table = sites(net, data[0][0])
    problem = Problem(table, candidates(net, data, None, table, loss_fn, **WIDTHS))
    return select(problem, None, "manual", bits=bits or {s.name: 4 for s in table}), problem


@pytest.mark.parametrize(("loss_fn", "norm"), [(classified, False), (regressed, False), (classified, True)])
@pytest.mark.parametrize("after", ["quantizing", "batchnorm"])
def test_shares_add_up_to_the_uniform_network(loss_fn, norm, after):
    net, data = network(norm), batches()
    table = sites(net, data[0][0])
    weighed = candidates(net, data, None, table, loss_fn, **WIDTHS)
    state = copy.deepcopy(net.state_dict())
    made = forecast(net, data, loss_fn, table, weighed, mode="accurate", after=after)
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items()) and net.training
    for bits, measured in made.measured_uniform.items():
        assert made.forecast_uniform[bits] == pytest.approx(measured, rel=0.15), bits
        assert made.residual(bits) == pytest.approx(made.forecast_uniform[bits] / measured - 1)
    uniform = {s.name: 4 for s in table}
    assert (made.start > 0) == (norm and after == "batchnorm")
    assert made.of(uniform) == pytest.approx(made.start + made.forecast_uniform[4])
    assert made.error(uniform) == pytest.approx(
        abs(made.residual(4)) * sum(abs(share[4]) for share in made.shares.values())
    )


@pytest.mark.parametrize("own", [True, False])
def test_the_start_is_what_new_statistics_change_by_themselves(own):
    net, data = network(norm=True), batches()
    table = sites(net, data[0][0])
    weighed = candidates(net, data, None, table, classified, **WIDTHS)
    others = data if own else batches(3)[2:]
    given = {} if own else {"statistics": others}
    made = forecast(net, data, classified, table, weighed, after="batchnorm", **given)
    then = [net.eval()(x).detach() for x, _ in data]
    plan = select(Problem(table, weighed), None, "manual", bits={s.name: 8 for s in table})
    quantize(net, plan)
    reestimate_batchnorm(net, others)
    apart = sum(float(kl(a, net.eval()(x))) * len(x) for a, (x, _) in zip(then, data)) / sum(len(x) for x, _ in data)
    assert apart > 0.01 and made.of(plan) == pytest.approx(apart, rel=0.05)


def test_the_measured_uniform_network_is_the_quantized_one():
    net, data = network(), batches()
    plan, problem = planned(net, data)
    made = forecast(net, data, classified, problem.table, problem.candidates)
    target = FloatDistance(net, data, classified)
    with loss_of_plan(net, data, target) as measured:
        assert measured(plan) == pytest.approx(made.measured_uniform[4], rel=1e-4)


def test_shares_of_a_plan_add_up_to_its_distance():
    net, data = network(), batches()
    plan, problem = planned(net, data)
    given = (net, data, classified, problem.table, problem.candidates)
    bits = plan.bits | {problem.table.weights[0].name: 2}
    shares = shares_of_plan(*given, bits)
    target = FloatDistance(net, data, classified)
    with loss_of_plan(net, data, target) as measured:
        assert math.fsum(shares.values()) == pytest.approx(
            measured(select(problem, None, "manual", bits=bits)), rel=0.1
        )
    uniform = forecast(*given, mode="accurate")
    again = shares_of_plan(*given, dict.fromkeys(bits, 4))
    size = uniform.forecast_uniform[4]
    assert again == pytest.approx({name: share[4] for name, share in uniform.shares.items()}, rel=0.1, abs=0.02 * size)
    with pytest.raises(HawqError, match="The plan says nothing of site"):
        shares_of_plan(*given, {})


def test_a_site_of_other_widths_moves_and_has_one_share():
    """The input has 8 bits at every width: its gradient is wanted once, its error is in every uniform network."""
    net, data = network(), batches()
    table = sites(net, data[0][0])
    weighed = candidates(net, data, None, table, classified, weight_bits=(2, 4, 8), activation_bits=(4, 8))
    made = forecast(net, data, classified, table, weighed, mode="accurate")
    (read,) = [s.name for s in table.activations if len(weighed[s.name]) == 1]
    assert list(made.shares[read]) == [8] and made.shares[read][8] > 0
    with loss_of_plan(net, data, FloatDistance(net, data, classified)) as measured:
        for bits in (4, 8):
            plan = select(Problem(table, weighed), None, "manual", bits={s.name: bits for s in table} | {read: 8})
            assert measured(plan) == pytest.approx(made.measured_uniform[bits], rel=1e-4)
            assert made.of(plan) == pytest.approx(made.forecast_uniform[bits])


def test_shares_are_the_path_integral():
    """By two hundred points and plain autograd, weights alone."""
    net, data = network().double(), batches(1)
    x = data[0][0].double()
    table = sites(net, x)
    weighed = candidates(net, [(x, data[0][1])], None, table, classified, weight_bits=(2, 4), activation_bits=None)
    made = forecast(net, [(x, data[0][1])], classified, table, weighed, mode="accurate")
    errors = {name: made.whole() for name, made in rounding_errors(net, weighed, table).weights.items()}
    then, total = net(x).detach(), dict.fromkeys(weighed, 0.0)
    for k in range(200):
        moved = copy.deepcopy(net)
        weights = dict(moved.named_parameters())
        with torch.no_grad():
            for name, of_site in errors.items():
                weights[name].add_((k + 0.5) / 200 * of_site[0])
        slopes = torch.autograd.grad(kl(then, moved(x)), [weights[n] for n in errors])
        for (name, of_site), slope in zip(errors.items(), slopes):
            total[name] += float((slope * of_site[0]).sum()) / 200
    size = max(map(abs, total.values()))
    for name, share in total.items():
        assert made.shares[name][2] == pytest.approx(share, rel=1e-3, abs=1e-3 * size)


def clips(weighed: Candidates, share: float) -> Candidates:
    """With grids of the activations that end at a share of their range."""

    def shorter(c: Candidate) -> Candidate:
        return c if c.scale is None else replace(c, scale=share * c.scale)

    return replace(weighed, by_site={n: tuple(map(shorter, of)) for n, of in weighed.items()})


@pytest.mark.parametrize("quantizer", ["uniform", "lsq", "pact", "rvq"])
@pytest.mark.parametrize("weight_bits", [3, 8])
@pytest.mark.parametrize("share", [0.3, 0.5])
def test_what_is_clipped_passes_on_no_more_than_it_does(share, weight_bits, quantizer):
    """Where it clips, a read answers to errors before it by 1 - t; by 1, shares add up to 1.25 to 1.55 distances."""
    net, data = network(norm=True), batches()
    table = sites(net, data[0][0])
    widths = {"weight_bits": (3, 8), "activation_bits": (8,), "input_bits": None}
    weighed = clips(candidates(net, data, None, table, classified, quantizer=quantizer, **widths), share)
    bits = {s.name: weight_bits if s.kind == "weight" else 8 for s in table}
    shares = shares_of_plan(net, data, classified, table, weighed, bits)
    made = forecast(net, data, classified, table, weighed, mode="accurate")
    assert math.fsum(shares.values()) == pytest.approx(made.measured_uniform[weight_bits], rel=0.04)
    if weight_bits == 3 and share == 0.5:  # reads without a share at this width clip as well
        first = table.weights[0].name
        assert made.shares[first][3] == pytest.approx(shares[first], rel=0.05)


def test_weights_that_are_computed_and_shared_ones_move_too():
    torch.manual_seed(0)
    net = nn.Sequential(parametrizations.weight_norm(nn.Linear(6, 6)), nn.ReLU(), nn.Linear(6, 6), nn.Linear(6, 6))
    net[3].weight = net[2].weight
    data = batches(1)
    table = sites(net, data[0][0])
    weighed = candidates(net, data, None, table, classified, weight_bits=(3, 8), activation_bits=None)
    made = forecast(net, data, classified, table, weighed, mode="accurate")
    assert set(made.shares) == {s.name for s in table.weights} and len(made.shares) == 2
    assert all(share[3] != 0 for share in made.shares.values())
    for bits, measured in made.measured_uniform.items():
        assert made.forecast_uniform[bits] == pytest.approx(measured, rel=0.1), bits


class Called(nn.Module):
    """A middle layer of one weight, called so many times."""

    def __init__(self, middle: nn.Module, times: int):
        super().__init__()
        self.first, self.middle, self.last, self.times = nn.Linear(6, 6), middle, nn.Linear(6, 4), times

    def forward(self, x):
        x = self.first(x)
        for _ in range(self.times):
            x = torch.tanh(self.middle(x))
        return self.last(x)


class Doubled(nn.Module):
    def forward(self, w):
        return 2 * w


def doubled(layer: nn.Module) -> nn.Module:
    parametrize.register_parametrization(layer, "weight", Doubled())
    return layer


COMPUTED = {
    "weight_norm": parametrizations.weight_norm,
    "old_weight_norm": old_weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "old_spectral_norm": old_spectral_norm,
    "pruned": lambda layer: prune.random_unstructured(layer, "weight", 0.3),
    "own": doubled,
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated:FutureWarning")
@pytest.mark.parametrize("mode", ["fast", "accurate"])
@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("kind", COMPUTED)
def test_a_weight_that_is_computed_moves_as_a_parameter_does(kind, times, mode):
    torch.manual_seed(0)
    net, data = Called(COMPUTED[kind](nn.Linear(6, 6)), times).eval(), batches(3)
    net(data[0][0])  # by which old-style hooks have computed their weight
    plain = Called(nn.Linear(6, 6), times)
    with torch.no_grad():
        for name in ("first", "middle", "last"):
            getattr(plain, name).weight.copy_(getattr(net, name).weight)
            getattr(plain, name).bias.copy_(getattr(net, name).bias)
    made = []
    for model in (net, plain):
        table = sites(model, data[0][0])
        weighed = candidates(model, data, None, table, classified, weight_bits=(2, 8), activation_bits=None)
        made.append(forecast(model, data, classified, table, weighed, mode=mode))
    assert made[0].measured_uniform == pytest.approx(made[1].measured_uniform, rel=1e-5)
    for site, share in made[1].shares.items():
        assert made[0].shares[site] == pytest.approx(share, rel=1e-4), site


class Forces(nn.Module):
    """An energy, and what it gives by its derivative, as networks of molecules do."""

    def __init__(self):
        super().__init__()
        self.energy = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 1))
        self.out = nn.Linear(6, 4)

    def forward(self, x):
        with torch.enable_grad():
            x = x.clone().requires_grad_(True)
            energy = self.energy(x)
            (forces,) = torch.autograd.grad(energy.sum(), x, create_graph=True)
        return energy, self.out(forces)


def by_energy(model: nn.Module, batch) -> torch.Tensor:
    return (model(batch[0])[0].squeeze(1) - batch[1]).square().mean()


def by_forces(model: nn.Module, batch) -> torch.Tensor:
    return F.cross_entropy(model(batch[0])[1], batch[1])


@pytest.mark.parametrize("mode", ["fast", "accurate"])
@pytest.mark.parametrize("widths", [{"activation_bits": None}, {"weight_bits": (8,), "activation_bits": (4, 8)}])
@pytest.mark.parametrize("loss_fn", [by_energy, by_forces])
def test_networks_that_differentiate_by_their_input(loss_fn, widths, mode):
    torch.manual_seed(0)
    net, data = Forces(), [(torch.randn(256, 6), torch.arange(256) % 4) for _ in range(2)]
    table = sites(net, data[0], forward=loss_fn)
    weighed = candidates(net, data, None, table, loss_fn, **{"weight_bits": (3, 8)} | widths)
    made = forecast(net, data, loss_fn, table, weighed, mode=mode)
    target, problem = FloatDistance(net, data, loss_fn), Problem(table, weighed)
    with loss_of_plan(net, data, target) as measured:
        for bits, distance in made.measured_uniform.items():
            chosen = {n: min((c.bits for c in of), key=lambda b: abs(b - bits)) for n, of in weighed.items()}
            plan = select(problem, None, "manual", bits=chosen)
            assert measured(plan) == pytest.approx(distance, rel=1e-3), bits
            assert made.forecast_uniform[bits] == pytest.approx(distance, rel=0.1), bits


def test_the_distance_is_the_mean_divergence_and_knows_its_batches():
    net, data = network().eval(), batches()
    target = FloatDistance(net, data, classified)
    assert [h.distance for h in target.heads] == ["kl"] and target.classifies
    assert float(target(net, data[0])) == pytest.approx(0.0, abs=1e-7) and target.agreement(net, data[0]) == 1.0
    then = net(data[1][0]).detach()
    with torch.no_grad():
        net[0].weight.mul_(1.3)
    now = net(data[1][0])
    assert float(target(net, data[1])) == pytest.approx(float(kl(then, now)), rel=1e-5)
    assert target.agreement(net, data[1]) == float((then.argmax(1) == now.argmax(1)).double().mean())
    relabelled = (data[1][0].clone(), data[1][1].clone())
    assert float(target(net, relabelled)) == pytest.approx(float(kl(then, now)), rel=1e-5)
    with pytest.raises(HawqError, match="none of those"):
        target(net, (data[0][0] + 1, data[0][1]))


def test_what_was_not_looked_at_is_refused(tmp_path):
    net, data = network(), batches(1)
    plan, problem = planned(net, data)
    made = forecast(net, data, classified, problem.table, problem.candidates)
    made = replace(made, start=0.5)
    made.save(tmp_path / "forecast.json")
    assert Forecast.load(tmp_path / "forecast.json") == made
    assert made.of(plan) > 0.5
    with pytest.raises(HawqError, match="start is -1"):
        Forecast.from_dict(made.to_dict() | {"start": -1})
    with pytest.raises(HawqError, match="hawq_lightning.forecast"):
        Forecast.from_dict(made.to_dict() | {"format": "hawq_lightning.plan"})
    assert made.of(plan) == pytest.approx(made.of(plan.bits))
    with pytest.raises(HawqError, match="3 bits, but at 2, 4, 8"):
        made.of(plan.bits | {"0.weight": 3})
    with pytest.raises(HawqError, match="'0.weigth'.*0.weight"):
        made.of({"0.weigth": 4})
    with pytest.raises(HawqError, match="exact"):
        forecast(net, data, classified, problem.table, problem.candidates, mode="exact")
    with pytest.raises(HawqError, match="no candidates"):
        forecast(net, data, classified, problem.table, Candidates({}))
