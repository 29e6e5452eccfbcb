"""Claims of the paper as tests: F1 and F2, Lemma 1, eq. 6 to 10."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from hawq_lightning import candidates, measure, sites
from hawq_lightning.sensitivity import find_sites
from tests.cases import build


class Quadratic(nn.Module):
    """Outputs sqrt(2 c_i) w_i, so that half their squared sum is sum c_i w_i^2."""

    def __init__(self, curvature: list[float]) -> None:
        super().__init__()
        self.layer = nn.Linear(1, len(curvature), bias=False).double()
        self.register_buffer("root", (2 * torch.tensor(curvature, dtype=torch.float64)).sqrt())
        with torch.no_grad():
            self.layer.weight.zero_()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) * self.root


def half_square(m, b):
    return m(b).square().sum() / 2


def test_f1_and_f2_differ_in_trace_and_not_in_top_eigenvalue():
    one = torch.ones(1, 1, dtype=torch.float64)
    traces, tops = [], []
    for curvature in ([100.0, 1.0], [100.0, 99.0]):
        net = Quadratic(curvature)
        found = measure(net, [one], half_square, estimator="exact", progress=False)
        traces.append(found["layer.weight"].mean_trace)
        hessian = torch.func.hessian(lambda w, c=curvature: (torch.tensor(c).double() * w.square()).sum())(
            torch.zeros(2, dtype=torch.float64)
        )
        tops.append(float(torch.linalg.eigvalsh(hessian)[-1]))
    assert tops == [200.0, 200.0]
    assert traces == pytest.approx([101.0, 199.0])


def test_lemma_1_equal_perturbations_cost_by_mean_trace():
    # two layers of unlike size at the minimum of a quadratic; dW = alpha * sum of eigenvectors, equal norms
    small, large = [8.0, 4.0], [5.0, 1.0, 1.0, 1.0, 1.0]
    one = torch.ones(1, 1, dtype=torch.float64)
    rises, means = [], []
    for curvature in (small, large):
        net = Quadratic(curvature)
        means.append(measure(net, [one], half_square, estimator="exact", progress=False)["layer.weight"].mean_trace)
        n = len(curvature)
        with torch.no_grad():
            net.layer.weight.fill_(1 / n**0.5)  # the eigenvectors are the axes
            rises.append(float(half_square(net, one)))
    assert means[0] > means[1]
    assert rises == pytest.approx([m / 2 for m in means])  # half of mean trace times ||dW||^2 = 1


class TwoLinear(nn.Module):
    """Linear in each layer's weights, so the loss is exactly quadratic in each."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(3, 4)
        self.b = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.a(x))


@pytest.fixture
def quadratic():
    net = build(TwoLinear)
    g = torch.Generator().manual_seed(3)
    x = torch.randn(6, 3, generator=g, dtype=torch.float64)
    y = net(x).detach()  # at the minimum: no gradient

    def loss(m, b):
        return F.mse_loss(m(b[0]), b[1])

    return net, (x, y), loss


def orthogonal_signs(n: int) -> torch.Tensor:
    """Columns whose outer products average to the identity: isotropic noise without sampling."""
    h = torch.ones(1, 1, dtype=torch.float64)
    while h.shape[0] < n:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    return h[:n]


@pytest.mark.parametrize("layer", ["a", "b"])
def test_omega_of_weights_predicts_twice_the_loss_change_under_isotropic_noise(quadratic, layer):
    net, batch, loss = quadratic
    record = measure(net, [batch], loss, estimator="exact", progress=False)[f"{layer}.weight"]
    weight = net.get_submodule(layer).weight
    signs = orthogonal_signs(weight.numel())
    rises = []
    with torch.no_grad():
        kept = weight.clone()
        for column in signs.T:
            weight.copy_(kept + 0.1 * column.reshape(weight.shape))
            rises.append(float(loss(net, batch)))
        weight.copy_(kept)
    omega = record.mean_trace * (0.1**2 * weight.numel())
    assert 2 * sum(rises) / len(rises) == pytest.approx(omega, rel=1e-9)


@pytest.mark.parametrize("layer", ["a", "b"])
def test_omega_of_activations_predicts_twice_the_loss_change_under_isotropic_noise(quadratic, layer):
    net, batch, loss = quadratic
    found = measure(net, [batch], loss, estimator="exact", progress=False)
    rows = torch.tensor(found.rows[f"{layer}.input"], dtype=torch.float64)
    sizes = torch.tensor(found.sizes[f"{layer}.input"], dtype=torch.float64)
    n = int(sizes[0])
    noise = 0.1 * (1 + torch.arange(6, dtype=torch.float64))  # each image its own level
    omega = float((rows / sizes * noise**2 * n).mean())
    rises = []
    for column in orthogonal_signs(n).T:
        handle = net.get_submodule(layer).register_forward_pre_hook(lambda m, a, c=column: (a[0] + noise[:, None] * c,))
        rises.append(float(loss(net, batch)))
        handle.remove()
    assert 2 * sum(rises) / len(rises) == pytest.approx(omega, rel=1e-9)


def test_activation_hessian_is_block_diagonal_over_images(quadratic):
    net, (x, y), loss = quadratic
    found = measure(net, [(x, y)], loss, estimator="exact", progress=False)
    assert found.row_unit["b.input"] == "image"
    alone = [
        measure(net, [(x[i : i + 1], y[i : i + 1])], loss, estimator="exact", progress=False)["b.input"].trace
        for i in range(6)
    ]
    assert list(found.rows["b.input"]) == pytest.approx(alone)  # eq. 9
    assert found["b.input"].trace == pytest.approx(sum(alone) / 6)


def test_options_of_activations_pair_trace_and_perturbation_image_by_image(quadratic):
    net, (x, y), loss = quadratic
    x = x * torch.logspace(-1, 1, 6, dtype=torch.float64)[:, None]
    table = find_sites(net, lambda: loss(net, (x, y)), 6)
    found = measure(
        net,
        [(x, y)],
        lambda m, b: torch.nn.functional.cross_entropy(m(b[0]), b[1].argmax(1)),
        sites=table,
        progress=False,
    )
    weighed = candidates(net, [(x, y)], found, table, loss, weight_bits=4, activation_bits=(3, 8), input_bits=None)
    site = weighed["a.input"]
    rows = torch.tensor(found.rows["a.input"], dtype=torch.float64)
    for option in site:
        q = torch.fake_quantize_per_tensor_affine(x.float(), option.scale, option.zero_point, 0, 2**option.bits - 1)
        error = (q - x.float()).double().square().sum(1)
        assert option.omega == pytest.approx(float((rows / 3 * error).mean()), rel=1e-4)
        assert option.perturbation == pytest.approx(float(error.mean()), rel=1e-4)


def test_traces_depend_on_the_quantized_readers_only():
    class Skip(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.out = nn.Linear(3, 3), nn.Linear(3, 2)

        def forward(self, x):
            h = F.relu(x)
            return self.out(self.a(h) + 5 * h)

    net, x = build(Skip), torch.randn(4, 3, dtype=torch.float64)
    y = torch.zeros(4, 2, dtype=torch.float64)
    found = measure(net, [(x, y)], lambda m, b: F.mse_loss(m(b[0]), b[1]), estimator="exact", progress=False)
    jacobian = net.out.weight @ net.a.weight  # the skip's 5 * out.weight is no part of it
    want = float(2 / 2 * jacobian.square().sum())  # mean over 2 outputs; per image, without 1/N
    assert found["a.input"].trace == pytest.approx(want)


def test_bit_choices_of_fig_1_are_as_many_as_the_paper_counts():
    assert 4**20 == 1_099_511_627_776  # "about 1e12"
    assert sum(1 for _ in itertools.combinations_with_replacement(range(4), 50)) == 23_426


def test_sites_of_the_default_are_those_of_fig_1():
    from hawq_lightning.models import resnet20

    table = sites(resnet20(), torch.randn(1, 3, 32, 32))
    assert len(table.weights) == 20
    assert sum(s.numel for s in table.weights) == 268_336
