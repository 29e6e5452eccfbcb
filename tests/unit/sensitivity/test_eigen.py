"""Top eigenvalues and eigenvectors of Hessian blocks against dense ones."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from hawq_lightning import HawqError
from hawq_lightning.sensitivity import InputHooks, find_sites, top_eigenpairs, top_eigenvalues
from tests.cases import CASES, ConvNet, batch_for, build, image_batch
from tests.unit.sensitivity.test_estimators import Smooth


def dense(slope, point):
    rows = [torch.autograd.grad(g, point, retain_graph=True)[0].flatten() for g in slope.flatten()]
    return torch.stack(rows)


def dense_weight(net, batch, loss_fn, name):
    weight = net.get_submodule(name).weight
    (slope,) = torch.autograd.grad(loss_fn(net, batch), weight, create_graph=True)
    return dense(slope, weight)


@pytest.mark.parametrize("name", ["cross_entropy", "focal", "two_heads_shared_levels", "one_dimension"])
@pytest.mark.parametrize("kind", ["ggn", "hessian"])
def test_weights_of_piecewise_linear_networks(name, kind):
    net_type, loss_fn = CASES[name]
    net, batch = build(net_type), batch_for(net_type)
    table = find_sites(net, lambda: loss_fn(net, batch), 4)
    names = [s.name for s in table.weights if s.numel <= 150]
    found = top_eigenpairs(net, [batch], loss_fn, sites=table, only=names, count=2, kind=kind, rtol=1e-6)
    assert len(names) >= 2
    for site in names:
        h = dense_weight(net, batch, loss_fn, site.removesuffix(".weight"))
        values = torch.linalg.eigvalsh(h).flip(0)
        assert found[site].values[0] == pytest.approx(float(values[0]), rel=1e-5)
        assert found[site].values[1] == pytest.approx(float(values[1]), rel=1e-5, abs=1e-8 * float(values[0]))
        v = found[site].vectors[0].flatten()
        assert float(v.norm()) == pytest.approx(1, rel=1e-9)
        assert float((h @ v - values[0] * v).norm()) < 1e-5 * float(values[0])


def test_the_true_hessian_of_a_smooth_network_differs_and_is_found():
    net, batch = build(Smooth), image_batch()
    loss_fn = lambda m, b: F.cross_entropy(3 * m(b[0]), b[1])  # noqa: E731
    true = top_eigenvalues(net, [batch], loss_fn, kind="hessian", rtol=1e-5, only=["stem.weight", "mix.weight"])
    ggn = top_eigenvalues(net, [batch], loss_fn, kind="ggn", rtol=1e-5, only=["stem.weight", "mix.weight"])
    for site in true:
        h = dense_weight(net, batch, loss_fn, site.removesuffix(".weight"))
        assert true[site] == pytest.approx(float(torch.linalg.eigvalsh(h)[-1]), rel=1e-4)
        assert abs(ggn[site] / true[site] - 1) > 1e-3


def test_several_batches_are_one_mean_loss():
    _, loss_fn = CASES["cross_entropy"]
    net = build(ConvNet)
    x, y = torch.randn(10, 2, 8, 8, dtype=torch.float64), torch.arange(10) % 3
    whole = top_eigenvalues(net, [(x, y)], loss_fn, rtol=1e-6)
    parts = top_eigenvalues(net, [(x[:6], y[:6]), (x[6:], y[6:])], loss_fn, rtol=1e-6)
    for name, value in whole.items():
        assert parts[name] == pytest.approx(value, rel=1e-5), name


def test_activations_are_means_over_images():
    _, loss_fn = CASES["cross_entropy"]
    net, batch = build(ConvNet), image_batch()
    table = find_sites(net, lambda: loss_fn(net, batch), 4)
    found = top_eigenvalues(net, [batch], loss_fn, sites=table, rtol=1e-6)
    layers = {x.name: net.get_submodule(x.name) for x in table.layers}
    site_of = {x.name: x.activation for x in table.layers}
    for wanted in ("same.input", "fc.input"):
        tops = []
        for i in range(4):
            one = (batch[0][i : i + 1], batch[1][i : i + 1])
            shifts = []

            def visit(name, x, wanted=wanted, shifts=shifts):
                if name != wanted:
                    return x
                shifts.append(torch.zeros_like(x, requires_grad=True))
                return x + shifts[-1]

            with InputHooks(layers, site_of, visit):
                loss = loss_fn(net, one)
            (slope,) = torch.autograd.grad(loss, shifts, create_graph=True)
            tops.append(float(torch.linalg.eigvalsh(dense(slope, shifts[0]))[-1]))
        assert found[wanted] == pytest.approx(sum(tops) / 4, rel=1e-4)


def test_bad_input():
    _, loss_fn = CASES["cross_entropy"]
    net, batch = build(ConvNet), image_batch()
    with pytest.raises(HawqError, match="fc.weight"):
        top_eigenvalues(net, [batch], loss_fn, only=["fc.weigth"])
    with pytest.raises(HawqError, match="hessian"):
        top_eigenvalues(net, [batch], loss_fn, kind="hesian")
    with pytest.raises(HawqError, match="batches"):
        top_eigenvalues(net, [], loss_fn)
