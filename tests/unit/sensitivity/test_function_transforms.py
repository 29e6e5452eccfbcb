"""Losses with ``torch.func`` in them: what cannot be followed is one error that says so, what can be is measured."""

import pytest
import torch
from torch import func, nn
from torch.nn import functional as F

from hawq_lightning import HawqError, measure
from hawq_lightning.callbacks import MeasureTraces
from tests.trainers import Classifier, loader, trainer

POINTS = torch.rand(16, 2, generator=torch.Generator().manual_seed(0))


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1))


def single(m):
    return lambda x: m(x[None])[0]


def per_sample(m, x):
    return func.vmap(single(m))(x).square().mean()


def derivatives(transform):
    return lambda m, x: (func.vmap(transform(single(m)))(x).flatten(1)[:, :1] + m(x)).square().mean()


def along(m, x):
    u, slope = func.jvp(m, (x,), (torch.ones_like(x),))
    return (u + slope).square().mean()


def pulled_back(m, x):
    u, pull = func.vjp(m, x)
    return (u + pull(torch.ones_like(u))[0][:, :1]).square().mean()


def of_each_sample(m, x):
    state = dict(m.named_parameters())
    grads = func.grad(lambda p: func.functional_call(m, p, (x,)).square().mean())(state)
    return m(x).square().mean() + 0.1 * sum(g.square().sum() for g in grads.values())


def ensemble(m, x):
    state = dict(m.named_parameters())
    scaled = func.vmap(lambda s: func.functional_call(m, {n: s * p for n, p in state.items()}, (x,)))
    return scaled(torch.tensor([0.9, 1.1])).square().mean()


NOT_FOLLOWED = {
    "vmap": per_sample,
    **{t.__name__: derivatives(t) for t in (func.jacrev, func.jacfwd, func.hessian)},
    "jvp": along, "vjp": pulled_back, "per-sample gradients": of_each_sample, "ensemble": ensemble,
}  # fmt: skip


@pytest.mark.parametrize("estimator", ["auto", "ggn", "hutchinson"])
@pytest.mark.parametrize("kind", NOT_FOLLOWED)
def test_the_error_names_what_to_do_and_nothing_has_moved(kind, estimator):
    m = net()
    before = {n: p.clone() for n, p in m.state_dict().items()}
    assert torch.isfinite(NOT_FOLLOWED[kind](m, POINTS))
    with pytest.raises(HawqError, match=r"transform of torch\.func.*torch\.autograd\.grad"):
        measure(m, [POINTS], NOT_FOLLOWED[kind], estimator=estimator, max_probes=2, progress=False)
    assert all(torch.equal(p, before[n]) for n, p in m.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in m.parameters())
    assert torch.isfinite(NOT_FOLLOWED[kind](m, POINTS))


def test_the_remedy_gives_traces():
    def slope(m, x):
        x = x.clone().requires_grad_(True)
        u = m(x)
        return (torch.autograd.grad(u.sum(), x, create_graph=True)[0][:, :1] + u).square().mean()

    traces = measure(net(), [POINTS], slope, estimator="hutchinson", max_probes=4, progress=False)
    assert all(torch.isfinite(torch.tensor(t.trace)) for t in traces if t.kind == "weight")


def each_sample_alone(m, x):
    return func.vmap(lambda out: F.softplus(out).sum())(m(x)).mean()


def of_another_function(m, x):
    return m(x).square().mean() * (1 + func.grad(lambda v: v.square().sum())(x).mean().detach())


@pytest.mark.parametrize("loss", [each_sample_alone, of_another_function])
def test_transforms_that_hold_no_layer_are_followed_or_named(loss):
    plain = measure(net(), [POINTS], lambda m, x: F.softplus(m(x)).sum() / len(x), max_probes=4, progress=False)
    try:
        traces = measure(net(), [POINTS], loss, max_probes=4, progress=False)
    except HawqError as error:
        assert "torch.func" in str(error)
    else:
        assert {t.name for t in traces} == {t.name for t in plain}


def test_an_error_of_the_users_own_stays():
    def loss(m, x):
        return func.vmap(lambda row: {}[row.shape])(x)

    with pytest.raises(KeyError):
        measure(net(), [POINTS], loss, progress=False)

    def shapes(m, x):
        return func.vmap(lambda row: row @ torch.ones(3))(x).sum()

    with pytest.raises(RuntimeError) as told:
        measure(net(), [POINTS], shapes, progress=False)
    assert not isinstance(told.value, HawqError)


def test_a_fit_stops_before_it_trains(tmp_path):
    class ByVmap(Classifier):
        def loss(self, batch):
            x, y = batch
            return F.cross_entropy(func.vmap(lambda row: self(row[None])[0])(x), y)

        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 4))

    model = ByVmap()
    before = {n: p.clone() for n, p in model.state_dict().items()}
    with pytest.raises(HawqError, match=r"transform of torch\.func"):
        trainer(tmp_path, MeasureTraces()).fit(model, loader())
    assert all(torch.equal(p, before[n]) for n, p in model.state_dict().items())
