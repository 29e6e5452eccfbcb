"""Traces against dense Hessians in float64: every layer type and loss, exactly and within their standard errors."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from hawq_lightning import HawqError, measure
from hawq_lightning.sensitivity import (
    MeasureContext,
    backpropagate,
    batch_images,
    factor_probe,
    factorize_loss_hessian,
    find_sites,
    forward_pass,
    hutchinson_batch,
    isolated_eval,
    samples_apart,
)
from tests.cases import CASES, ConvNet, batch_for, build, dense_activation_traces, dense_weight_traces


def prepare(name: str):
    kind, loss_fn = CASES[name]
    net, batch = build(kind), batch_for(kind)
    table = find_sites(net, lambda: loss_fn(net, batch), 4)
    truth = dense_weight_traces(net, batch, loss_fn, table) | dense_activation_traces(net, batch, loss_fn, table)
    assert any(abs(t) > 1e-6 for t in truth.values())
    return net, batch, loss_fn, table, truth


@pytest.mark.parametrize("name", CASES)
def test_all_output_columns_give_the_dense_trace(name):
    net, batch, loss_fn, table, truth = prepare(name)
    found = measure(net, [batch], loss_fn, sites=table, estimator="exact", l1_curvature="zero", progress=False)
    for r in found:
        assert r.trace == pytest.approx(truth[r.name], rel=1e-8, abs=1e-10), r.name
        assert r.stderr == 0


@pytest.mark.parametrize("name", CASES)
def test_random_probes_agree_within_their_standard_errors(name):
    net, batch, loss_fn, table, truth = prepare(name)
    found = measure(
        net, [batch], loss_fn, sites=table, rtol=0.05, max_probes=100, seed=3, l1_curvature="zero", progress=False
    )
    for r in found:
        assert abs(r.trace - truth[r.name]) <= 4.5 * r.stderr + 1e-8 * abs(truth[r.name]), (r, truth[r.name])


@pytest.mark.parametrize("name", ["cross_entropy", "class_weights", "one_dimension", "three_dimensions", "bce"])
@pytest.mark.parametrize("rotate", [False, True])
def test_enumerating_all_sign_vectors_is_exact(name, rotate):
    net, batch, loss_fn, table, truth = prepare(name)
    with isolated_eval(net):
        layers = {x.name: net.get_submodule(x.name) for x in table.layers}
        context = MeasureContext(net, layers, table, loss_fn)
        per_sample = samples_apart(context, batch, 4, batch_images)
        assert all(per_sample.values())
        total = {s.name: 0.0 for s in table}
        with forward_pass(context, batch, per_sample) as forward:
            blocks = factorize_loss_hessian(forward.hessian, torch.Generator().manual_seed(0))
            assert blocks is not None
            (values,) = forward.hessian.values
            patterns = list(itertools.product((-1.0, 1.0), repeat=values.shape[1]))
            for pattern in patterns:
                z = [torch.tensor(pattern, dtype=values.dtype).expand_as(values)]
                for site, rows in backpropagate(
                    forward, factor_probe(forward.hessian, blocks, z, rotate=rotate)
                ).items():
                    total[site] += float(rows.sum()) / len(patterns)
    for site, value in total.items():
        assert value == pytest.approx(truth[site], rel=1e-10, abs=1e-13)


def test_hutchinson_over_an_orthogonal_sign_set_is_exact():
    net, batch, loss_fn, table, truth = prepare("cross_entropy")
    order = 256  # Sylvester's Hadamard matrix: its rows, cut to any length, stay orthogonal over all columns
    hadamard = torch.ones(1, 1, dtype=torch.float64)
    while hadamard.shape[0] < order:
        hadamard = torch.cat([torch.cat([hadamard, hadamard], 1), torch.cat([hadamard, -hadamard], 1)])
    wanted = [s.name for s in table if s.numel <= order]
    assert len(wanted) >= 6
    total = dict.fromkeys(wanted, 0.0)
    with isolated_eval(net):
        layers = {x.name: net.get_submodule(x.name) for x in table.layers}
        context = MeasureContext(net, layers, table, loss_fn)
        per_sample = {s.name: s.kind == "activation" for s in table}
        for column in range(order):

            def sample(like, column=column):
                if like.numel() <= order:
                    return hadamard[: like.numel(), column].reshape(like.shape)
                per = like[0].numel()  # eq. 9: images are independent, so they may share signs
                one = hadamard[:per, column] if per <= order else torch.zeros(per, dtype=torch.float64)
                return one.reshape(1, *like.shape[1:]).expand_as(like)

            rows = hutchinson_batch(context, batch, 4, per_sample, sample, 1).rows[0]
            for n in wanted:
                total[n] += float(rows[n].sum()) / order
    for name in wanted:
        assert total[name] == pytest.approx(truth[name], rel=1e-9, abs=1e-12), name


@pytest.mark.parametrize("distribution", ["rademacher", "gaussian"])
def test_sampled_hutchinson_agrees_within_its_standard_errors(distribution):
    net, batch, loss_fn, table, truth = prepare("cross_entropy")
    found = measure(
        net, [batch], loss_fn, sites=table, estimator="hutchinson", rtol=0.1, max_probes=200, seed=1,
        distribution=distribution, progress=False,
    )  # fmt: skip
    for r in found:
        assert abs(r.trace - truth[r.name]) <= 4.5 * r.stderr, r


def test_rotated_softmax_regression_is_exact_with_every_probe():
    torch.manual_seed(0)
    net, x, y = nn.Linear(5, 4).double(), torch.randn(6, 5, dtype=torch.float64), torch.arange(6) % 4
    p = torch.softmax(net(x), 1).detach()
    truth = float(((1 - p.square().sum(1)) * x.square().sum(1)).mean())
    found = measure(net, [(x, y)], lambda m, b: F.cross_entropy(m(b[0]), b[1]), progress=False)
    assert found["weight"].trace == pytest.approx(truth, rel=1e-9)
    assert found["weight"].stderr <= 1e-6 * truth


def test_linear_regression_has_the_closed_form():
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(3, 2)).double(), torch.randn(7, 3, dtype=torch.float64)
    y = torch.randn(7, 2, dtype=torch.float64)
    found = measure(net, [(x, y)], lambda m, b: F.mse_loss(m(b[0]), b[1]), estimator="exact", progress=False)
    # mean over 7 x 2 elements: H = (2 / 14) x x^T for each of the two outputs
    assert found["0.weight"].trace == pytest.approx(2 * 2 / 14 * float(x.square().sum()), rel=1e-12)


def test_loss_times_a_constant_scales_traces():
    net, batch, loss_fn, table, _ = prepare("cross_entropy")
    one = measure(net, [batch], loss_fn, sites=table, progress=False, seed=5)
    ten = measure(net, [batch], lambda m, b: 10 * loss_fn(m, b), sites=table, progress=False, seed=5)
    for a, b in zip(one, ten):
        assert b.trace == pytest.approx(10 * a.trace, rel=1e-6)
        assert b.stderr == pytest.approx(10 * a.stderr, rel=1e-4, abs=1e-9 * b.trace)


def test_relu_rescaling_moves_mean_traces_but_no_omega():
    from hawq_lightning.quantization import weight_candidates

    net, batch, loss_fn, table, truth = prepare("cross_entropy")
    with torch.no_grad():
        before = {n: net.get_submodule(n).weight.clone() for n in ("stem", "fc")}
        net.bn.weight.mul_(4.0)
        net.bn.bias.mul_(4.0)  # everything after the first ReLU is positively homogeneous
        for layer in (net.grouped, net.same):
            if layer.bias is not None:
                layer.bias.mul_(4.0)
        net.fc.weight.div_(4.0)
    after = measure(net, [batch], loss_fn, sites=table, estimator="exact", progress=False)
    factor = after["fc.weight"].trace / truth["fc.weight"]
    assert factor == pytest.approx(16.0, rel=1e-6)
    for bits in (2, 4):
        old = weight_candidates(before["fc"], 0, (bits,), truth["fc.weight"] / 12)[0].omega
        new = weight_candidates(net.fc.weight, 0, (bits,), after["fc.weight"].mean_trace)[0].omega
        assert new == pytest.approx(old, rel=1e-4)


def test_batch_order_and_batch_size_change_nothing_beyond_the_error():
    _, loss_fn = CASES["cross_entropy"]
    net = build(ConvNet)
    x, y = torch.randn(12, 2, 8, 8, dtype=torch.float64), torch.arange(12) % 3
    parts = [(x[i : i + 4], y[i : i + 4]) for i in (0, 4, 8)]
    whole = measure(net, [(x, y)], loss_fn, estimator="exact", progress=False)
    split = measure(net, parts[::-1], loss_fn, estimator="exact", progress=False)
    for a, b in zip(whole, split):
        assert b.trace == pytest.approx(a.trace, rel=1e-9)
        assert b.stderr_data == pytest.approx(a.stderr_data, rel=1e-9)


def test_l1_boxes_have_no_curvature_and_it_is_said():
    kind, _ = CASES["two_heads_shared_levels"]
    net, batch = build(kind), batch_for(kind)

    def loss_fn(m, b):
        scores, boxes = m(b[0])
        return F.binary_cross_entropy_with_logits(scores, torch.zeros_like(scores)) + boxes.abs().mean()

    found = measure(net, [batch], loss_fn, l1_curvature="zero", progress=False)
    assert found["box.weight"].trace == 0
    assert found["score.weight"].trace > 0
    assert any("box.weight" in note for note in found.notes)


def test_a_loss_without_any_curvature_is_refused():
    net, batch = build(ConvNet), batch_for(ConvNet)
    with pytest.raises(HawqError, match="no curvature"):
        measure(net, [batch], lambda m, b: m(b[0]).abs().sum(), l1_curvature="zero", progress=False)
