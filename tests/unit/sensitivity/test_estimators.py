"""The true Hessian where networks are not piecewise linear, the choice of estimator, L1 losses, memory, resuming."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from hawq_lightning import HawqError, measure
from hawq_lightning.sensitivity import (
    MeasureContext,
    Pilot,
    batch_images,
    find_sites,
    hutchinson_batch,
    isolated_eval,
    samples_apart,
)
from tests.cases import (
    CASES,
    ConvNet,
    SharedHead,
    batch_for,
    build,
    dense_activation_traces,
    dense_weight_traces,
    image_batch,
)  # fmt: skip


class Smooth(nn.Module):
    """SiLU as a function, a sigmoid gate written out, squeeze and excitation."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 3, 3, stride=2, padding=1)
        self.squeeze = nn.Linear(3, 2)
        self.excite = nn.Linear(2, 3)
        self.mix = nn.Conv2d(3, 3, 3, stride=2, padding=1)
        self.fc = nn.Linear(3, 3)

    def forward(self, x):
        x = F.silu(self.stem(x))
        x = x * torch.sigmoid(self.excite(F.relu(self.squeeze(x.mean((2, 3))))))[..., None, None]
        x = self.mix(x)
        x = x * torch.sigmoid(x)
        return self.fc(x.mean((2, 3)))


class Attention(nn.Module):
    """LayerNorm and softmax attention over positions."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(2, 4)
        self.norm = nn.LayerNorm(4)
        self.qkv = nn.Linear(4, 12)
        self.out = nn.Linear(4, 3)

    def forward(self, x):
        x = self.norm(self.embed(x.flatten(2).mT[:, ::16]))
        q, k, v = self.qkv(x)[:, None].chunk(3, -1)
        return self.out(F.scaled_dot_product_attention(q, k, v)[:, 0].mean(1))


class Serial(nn.Module):
    """Piecewise linear operations, but one weight is used twice in series."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 4)
        self.again = nn.Linear(4, 4)
        self.out = nn.Linear(4, 3)

    def forward(self, x):
        x = F.leaky_relu(self.first(x.mean((1, 2))), 0.3)
        return self.out(F.leaky_relu(self.again(F.leaky_relu(self.again(x), 0.3)), 0.3))


def loss_fn(m, b):
    return F.cross_entropy(m(b[0]), b[1])


def prepare(kind):
    net, batch = build(kind), image_batch()
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(2)
    table = find_sites(net, lambda: loss_fn(net, batch), 4)
    with sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no second derivative
        truth = dense_weight_traces(net, batch, loss_fn, table) | dense_activation_traces(net, batch, loss_fn, table)
    return net, batch, table, truth


@pytest.mark.parametrize("kind", [Smooth, Attention, Serial])
def test_hessian_gives_the_dense_trace_where_gauss_newton_does_not(kind):
    net, batch, table, truth = prepare(kind)
    gauss_newton = measure(net, [batch], loss_fn, sites=table, estimator="exact", progress=False)
    assert any(abs(r.trace - truth[r.name]) > 0.02 * abs(truth[r.name]) for r in gauss_newton)
    found = measure(
        net, [batch], loss_fn, sites=table, estimator="hessian", rtol=0.06, max_probes=200, seed=2, progress=False
    )
    assert found.settings["estimator"] == "hessian"
    for r in found:
        assert abs(r.trace - truth[r.name]) <= 4.5 * r.stderr + 1e-9 * abs(truth[r.name]), r
        assert r.stderr <= 0.4 * abs(truth[r.name]) + 0.04 * max(map(abs, truth.values())), r


@pytest.mark.parametrize("kind", [Smooth, Attention, Serial])
def test_the_missing_part_over_an_orthogonal_sign_set_is_exact(kind):
    net, batch, table, truth = prepare(kind)
    gauss_newton = measure(net, [batch], loss_fn, sites=table, estimator="exact", progress=False)
    order = 128
    hadamard = torch.ones(1, 1, dtype=torch.float64)
    while hadamard.shape[0] < order:
        hadamard = torch.cat([torch.cat([hadamard, hadamard], 1), torch.cat([hadamard, -hadamard], 1)])
    wanted = [s.name for s in table.weights if s.numel <= order]
    total = dict.fromkeys(wanted, 0.0)
    with isolated_eval(net):
        context = MeasureContext(net, {x.name: net.get_submodule(x.name) for x in table.layers}, table, loss_fn)
        for column in range(order):
            probes = hutchinson_batch(
                context, batch, 4, dict.fromkeys(wanted, False),
                lambda like, c=column: hadamard[: like.numel(), c].reshape(like.shape), 1,
                linearised=True, only=wanted,
            )  # fmt: skip
            for n in wanted:
                total[n] += float(probes.rows[0][n].sum()) / order
    for name in wanted:
        assert gauss_newton[name].trace + total[name] == pytest.approx(truth[name], rel=1e-9, abs=1e-12), name


@pytest.mark.parametrize("inplace", [False, True])
def test_hard_sigmoid_gates_have_a_second_derivative_here(inplace):
    torch.manual_seed(0)
    gate = nn.Sequential(nn.Linear(3, 3), nn.Hardsigmoid(inplace))

    class Net(nn.Module):
        def __init__(self, gate):
            super().__init__()
            self.first, self.gate, self.out = nn.Linear(4, 3), gate, nn.Linear(3, 3)

        def forward(self, x):
            x = self.first(x)
            return self.out(x * self.gate(x))

    net = Net(gate).double()
    batch = (torch.randn(4, 4, dtype=torch.float64), torch.arange(4) % 3)
    table = find_sites(net, lambda: loss_fn(net, batch), 4)
    found = measure(net, [batch], loss_fn, sites=table, estimator="hessian", rtol=0.08, max_probes=120, progress=False)
    assert found.settings["estimator"] == "hessian"
    gate[1] = type("Written", (nn.Module,), {"forward": lambda self, x: F.relu6(x + 3) / 6})()
    truth = dense_weight_traces(net, batch, loss_fn, table)
    for name, trace in truth.items():
        assert abs(found[name].trace - trace) <= 4.5 * found[name].stderr + 1e-9 * abs(trace), name


LAYERS = [(Attention, {"embed", "qkv"}), (Serial, {"again"}), (Smooth, {"stem", "squeeze", "excite", "mix"})]


@pytest.mark.parametrize(("kind", "layers"), LAYERS)
def test_auto_takes_gauss_newton_and_names_the_layers_where_that_is_not_the_hessian(kind, layers):
    net, batch, table, truth = prepare(kind)
    found = measure(net, [batch], loss_fn, sites=table, estimator="auto", rtol=0.3, max_probes=20, progress=False)
    ggn = measure(net, [batch], loss_fn, sites=table, estimator="ggn", rtol=0.3, max_probes=20, progress=False)
    assert found.settings["estimator"] == "ggn" and found.settings["estimator_asked"] == "auto"
    assert [r.trace for r in found] == [r.trace for r in ggn]
    (note,) = [n for n in found.notes if "estimator='auto'" in n]
    named = note.removeprefix("The network is not piecewise linear, for example at ").partition(":")[0]
    assert {*named.split(", ")} <= layers and "%" not in note
    exact = measure(net, [batch], loss_fn, sites=table, estimator="exact", progress=False)
    apart = {r.name.rpartition(".")[0] for r in exact if abs(r.trace - truth[r.name]) > 1e-6 * abs(r.trace)}
    assert apart and apart <= layers


class Deep(nn.Module):
    """Gated blocks without end."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(4, 8) for _ in range(blocks))
        self.fc = nn.Linear(4, 3)

    def forward(self, x):
        for block in self.blocks:
            a, b = block(x).chunk(2, -1)
            x = x + a * torch.sigmoid(b)
        return self.fc(x)


def test_how_long_auto_takes_to_choose_does_not_depend_on_the_depth():
    def losses(blocks):
        torch.manual_seed(0)
        net, batch = Deep(blocks).double(), (torch.randn(6, 4, dtype=torch.float64), torch.arange(6) % 3)
        count = {"n": 0}

        def counted(m, b):
            count["n"] += 1
            return loss_fn(m, b)

        found = measure(net, [batch], counted, rtol=9.0, max_probes=2, progress=False)
        (note,) = [n for n in found.notes if "piecewise" in n]
        return count["n"], note

    (few, _), (many, note) = losses(1), losses(30)
    assert few == many
    assert "for example at blocks.0:" in note


class Product(nn.Module):
    """Bilinear: no weight and no activation bends it alone."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 4), nn.Linear(3, 4)

    def forward(self, x):
        return self.a(x[:, :3]) * self.b(x[:, 3:])


def test_auto_says_nothing_of_a_product_whose_factors_do_not_bend_it_alone():
    torch.manual_seed(0)
    net, batch = Product().double(), (torch.randn(5, 6, dtype=torch.float64), torch.arange(5) % 4)
    found = measure(net, [batch], loss_fn, rtol=0.5, progress=False)
    assert not any("piecewise" in n for n in found.notes)
    truth = dense_weight_traces(net, batch, loss_fn, find_sites(net, lambda: loss_fn(net, batch), 5))
    exact = measure(net, [batch], loss_fn, estimator="exact", progress=False)
    for name, trace in truth.items():
        assert exact[name].trace == pytest.approx(trace, rel=1e-9)


def linear_loss(m, b):
    """As of energies and critics: whatever curvature there is, is the network's own."""
    o = m(b[0])
    return (o * torch.linspace(-1, 2, o.numel(), dtype=o.dtype).reshape(o.shape)).mean()


def test_auto_takes_the_hessian_where_the_loss_has_no_curvature_in_the_outputs():
    net, batch = build(Smooth), image_batch()
    table = find_sites(net, lambda: linear_loss(net, batch), 4)
    keywords = {"sites": table, "l1_curvature": "zero", "rtol": 0.1, "max_probes": 100, "progress": False}
    found = measure(net, [batch], linear_loss, **keywords)
    assert found.settings["estimator"] == "hessian"
    assert any("no curvature in its outputs" in n and "'hessian'" in n for n in found.notes)
    truth = dense_weight_traces(net, batch, linear_loss, table)
    assert any(abs(t) > 1e-3 for t in truth.values())
    for name, trace in truth.items():
        assert abs(found[name].trace - trace) <= 4.5 * found[name].stderr + 1e-9, name


@pytest.mark.parametrize(("kind", "layers"), LAYERS)
def test_only_the_layers_behind_which_something_bends_are_named(kind, layers):
    from hawq_lightning.sensitivity import check_linearity

    net, batch, table, _ = prepare(kind)
    with isolated_eval(net):
        context = MeasureContext(net, {x.name: net.get_submodule(x.name) for x in table.layers}, table, loss_fn)
        pilot = Pilot(batch, 4, samples_apart(context, batch, 4, batch_images), batch_images)
        found = check_linearity(context, pilot)
    assert {n.removesuffix(".weight") for n in found.nonlinear_sites if n.endswith(".weight")} == layers


@pytest.mark.parametrize("name", ["cross_entropy", "two_heads_shared_levels", "one_dimension", "tied_and_flattened"])
def test_auto_is_gauss_newton_for_piecewise_linear_networks(name):
    kind, case_loss = CASES[name]
    net, batch = build(kind), batch_for(kind)
    auto = measure(net, [batch], case_loss, rtol=0.5, progress=False)
    ggn = measure(net, [batch], case_loss, rtol=0.5, estimator="ggn", progress=False)
    assert auto.settings["estimator"] == "ggn"
    assert [r.trace for r in auto] == [r.trace for r in ggn]
    assert not any("piecewise" in n for n in auto.notes)


class Once(torch.autograd.Function):
    """A kernel without a second derivative, as RoIAlign is."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * torch.sigmoid(x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        s = torch.sigmoid(x)
        return grad * s * (1 + x * (1 - s))


def test_without_double_backward_auto_falls_back_and_hessian_refuses():
    torch.manual_seed(0)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x):
            return self.b(Once.apply(self.a(x)))

    net, batch = Net().double(), (torch.randn(4, 4, dtype=torch.float64), torch.arange(4) % 3)
    found = measure(net, [batch], loss_fn, progress=False, rtol=0.5)
    assert found.settings["estimator"] == "ggn"
    assert any("could not check" in n for n in found.notes)
    with pytest.raises(HawqError, match="double backward"):
        measure(net, [batch], loss_fn, estimator="hessian", progress=False)


def test_the_model_is_left_alone_by_every_estimator():
    net, batch, table, _ = prepare(Smooth)
    net.stem.weight.requires_grad_(False)
    before = copy.deepcopy(net.state_dict())
    for estimator in ("hessian", "auto", "hutchinson"):
        measure(net, [batch], loss_fn, sites=table, estimator=estimator, rtol=5.0, max_probes=4, progress=False)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert not net.stem.weight.requires_grad and net.fc.weight.requires_grad
    assert all(p.grad is None for p in net.parameters())


def l1_boxes(m, b):
    scores, boxes = m(b[0])
    return F.binary_cross_entropy_with_logits(scores, torch.zeros_like(scores)) + 3 * boxes.abs().mean()


def test_l1_losses_get_the_fisher_information_of_a_laplace_distribution():
    net, batch = build(SharedHead), batch_for(SharedHead)
    found = measure(net, [batch], l1_boxes, l1_curvature="fisher", estimator="exact", progress=False)
    scale = 3 / net(batch[0])[1].numel()

    def square(m, b):  # second derivative `scale` in every box output: unit Laplace information times the loss's scale
        scores, boxes = m(b[0])
        nll = F.binary_cross_entropy_with_logits(scores, torch.zeros_like(scores))
        return nll + 0.5 * scale * boxes.square().sum()

    expected = measure(net, [batch], square, estimator="exact", progress=False)
    for r in found:
        assert r.trace == pytest.approx(expected[r.name].trace, rel=1e-9)
    assert found["box.weight"].trace > 0
    assert found.settings["l1"] == "fisher"
    assert any("box" in n and "Laplace" in n for n in found.notes)
    sampled = measure(net, [batch], l1_boxes, l1_curvature="fisher", rtol=0.05, progress=False)
    for r in sampled:
        assert abs(r.trace - found[r.name].trace) <= 4.5 * r.stderr + 1e-9 * r.trace


@pytest.mark.stress
def test_l1_information_beside_a_loss_of_no_closed_form():
    net, batch = build(SharedHead), batch_for(SharedHead)

    def with_(box):
        def loss(m, b):
            scores, boxes = m(b[0])
            p = torch.softmax(scores.flatten(1), 1)
            return 1 - (p * p).sum(1).mean() + box(boxes)

        return loss

    truth = measure(net, [batch], with_(lambda x: 0.5 * x.square().mean()), estimator="exact", progress=False)
    found = measure(
        net, [batch], with_(lambda x: x.abs().mean()), l1_curvature="fisher", estimator="exact", progress=False
    )
    for r in found:
        assert r.trace == pytest.approx(truth[r.name].trace, rel=1e-8, abs=1e-12)


class Certain(nn.Module):
    """A softmax of one of the usual forms whose probabilities are all 0 or 1, and boxes beside it."""

    def __init__(self, axis):
        super().__init__()
        self.scores, self.boxes, self.axis = nn.Linear(4, 3), nn.Linear(4, 4), axis

    def forward(self, x):
        scores = 1e6 * (self.scores(x) if self.axis == 1 else self.scores(x[:, None].expand(-1, 5, -1)).mT)
        return scores, self.boxes(x)


@pytest.mark.parametrize("right", [False, True])
@pytest.mark.parametrize("axis", [1, 2])
def test_a_saturated_softmax_is_not_taken_for_an_l1_loss(axis, right):
    torch.manual_seed(0)
    net, x = Certain(axis), torch.randn(8, 4)
    labels = (net(x)[0].argmax(1) + (0 if right else 1)) % 3
    batch = (x, labels)

    def cross_entropy(m, b):
        return F.cross_entropy(m(b[0])[0], b[1])

    def with_boxes(m, b):
        return cross_entropy(m, b) + 0.1 * m(b[0])[1].abs().mean()

    with pytest.raises(HawqError, match=r"probabilities are all 0 or 1") as refused:
        measure(net, [batch], cross_entropy, progress=False, include="scores")
    assert "L1" not in str(refused.value)
    found = measure(net, [batch], with_boxes, progress=False)
    (note,) = [n for n in found.notes if "L1" in n]
    assert "output of boxes, as" in note and found["boxes.weight"].trace > 0 == found["scores.weight"].trace


def limited(loss, most):
    def small(m, b):
        if len(b[0]) > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return loss(m, b)

    return small


@pytest.mark.parametrize("name", ["cross_entropy", "sum_reduction", "mse", "bce"])
@pytest.mark.parametrize("most", [7, 3])
def test_batches_shrink_when_memory_runs_out(name, most):
    _, case_loss = CASES[name]
    net = build(ConvNet)
    x, y = torch.randn(12, 2, 8, 8, dtype=torch.float64), torch.arange(12) % 3
    batches = [(x[:8], y[:8]), (x[8:], y[8:])]
    whole = measure(net, batches, case_loss, estimator="exact", progress=False)
    parts = measure(net, batches, limited(case_loss, most), estimator="exact", progress=False)
    assert any("images at a time" in n for n in parts.notes)
    for a, b in zip(whole, parts):
        assert b.trace == pytest.approx(a.trace, rel=1e-9)
        assert list(parts.rows[a.name]) == pytest.approx(list(whole.rows[a.name]), rel=1e-9, abs=1e-13)


def test_memory_that_runs_out_in_the_middle_and_the_other_estimators():
    net, batch, table, truth = prepare(Smooth)
    calls = {"n": 0}

    def sometimes(m, b):
        calls["n"] += 1
        if calls["n"] > 30 and len(b[0]) > 2:
            raise torch.OutOfMemoryError("out of memory")
        return loss_fn(m, b)

    found = measure(net, [batch], sometimes, sites=table, estimator="hessian", rtol=0.1, max_probes=80, progress=False)
    assert any("2 images at a time" in n for n in found.notes)
    for r in found:
        assert abs(r.trace - truth[r.name]) <= 4.5 * r.stderr + 1e-9 * abs(truth[r.name]), r


def test_coupled_losses_are_not_taken_apart():
    net = build(ConvNet)
    x, y = torch.randn(8, 2, 8, 8, dtype=torch.float64), torch.tensor([0, 0, 0, 0, 2, 2, 2, 1])
    for name in ("class_weights", "dice"):
        with pytest.raises((HawqError, torch.OutOfMemoryError), match="emory"):
            measure(net, [(x, y)], limited(CASES[name][1], 5), progress=False)


class StopError(Exception):
    pass


def test_an_interrupted_measurement_resumes_with_the_same_result(tmp_path):
    _, case_loss = CASES["cross_entropy"]
    net = build(ConvNet)
    x, y = torch.randn(12, 2, 8, 8, dtype=torch.float64), torch.arange(12) % 3
    batches = [(x[i : i + 4], y[i : i + 4]) for i in (0, 4, 8)]
    path = tmp_path / "rows.partial"
    calls = {"n": 0}

    def counted(m, b):
        calls["n"] += 1
        return case_loss(m, b)

    kwargs = {"rtol": 0.03, "max_probes": 2000, "progress": False}
    whole = measure(net, batches, counted, **kwargs)
    needed, calls["n"] = calls["n"], 0

    def cut(m, b):
        if calls["n"] > needed * 0.7:
            raise StopError
        return counted(m, b)

    with pytest.raises(StopError):
        measure(net, batches, cut, resume=path, **kwargs)
    assert path.is_file()
    calls["n"] = 0
    again = measure(net, batches, counted, resume=path, **kwargs)
    assert calls["n"] < 0.6 * needed
    assert [r.trace for r in again] == [r.trace for r in whole]
    assert [r.stderr for r in again] == [r.stderr for r in whole]
    assert not path.is_file()


def test_rows_of_another_measurement_or_a_damaged_file_are_not_used(tmp_path):
    _, case_loss = CASES["cross_entropy"]
    net, path = build(ConvNet), tmp_path / "rows.partial"
    batch = image_batch()
    kwargs = {"rtol": 0.5, "progress": False}
    plain = measure(net, [batch, batch], case_loss, **kwargs)
    path.write_bytes(b"not a file of ours")
    assert [r.trace for r in measure(net, [batch, batch], case_loss, resume=path, **kwargs)] == [r.trace for r in plain]
    with pytest.raises(StopError):
        measure(net, [batch, batch], _stops_after(case_loss, 18), resume=path, rtol=0.01, progress=False)
    assert path.is_file()
    with torch.no_grad():
        net.fc.weight.mul_(1.1)
    other = measure(net, [batch, batch], case_loss, resume=path, rtol=0.01, progress=False)
    fresh = measure(net, [batch, batch], case_loss, rtol=0.01, progress=False)
    assert [r.trace for r in other] == [r.trace for r in fresh]


def _stops_after(loss, calls):
    count = {"n": 0}

    def counted(m, b):
        count["n"] += 1
        if count["n"] > calls:
            raise StopError
        return loss(m, b)

    return counted
