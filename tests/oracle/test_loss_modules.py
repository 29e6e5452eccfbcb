"""Modules that own parameters and return the loss or a part of it: traces against dense Hessians in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from hawq_lightning import measure
from hawq_lightning.sensitivity import find_sites
from tests.cases import dense_activation_traces, dense_weight_traces
from tests.internals import internal

Batch = tuple[torch.Tensor, torch.Tensor]
Loss = Callable[[nn.Module, Batch], torch.Tensor]


def distances(x: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """``torch.cdist``, whose second derivative torch 2.9 has not: there by differences."""
    if torch.__version__ < torch.torch_version.TorchVersion("2.10"):
        return (x[:, None] - points).norm(dim=-1)
    return torch.cdist(x, points)


class Body(nn.Module):
    """Features and logits, piecewise linear."""

    def __init__(self, loss: nn.Module | None = None) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 4)
        self.loss = loss

    def forward(self, x):
        return self.b(F.relu(self.a(x)))


class Classifier(Body):
    """Returns logits as well."""

    def __init__(self, loss: nn.Module | None = None) -> None:
        super().__init__(loss)
        self.o = nn.Linear(4, 3)

    def forward(self, x):
        f = super().forward(x)
        return f, self.o(F.relu(f))


class Centres(nn.Module):
    def __init__(self, reduce: bool = True) -> None:
        super().__init__()
        self.centres, self.reduce = nn.Parameter(torch.randn(3, 4)), reduce

    def forward(self, f, y):
        d = (f - self.centres[y]).square().sum(1)
        return d.mean() if self.reduce else d


class ArcFace(nn.Module):
    def __init__(self, reduction: str = "mean") -> None:
        super().__init__()
        self.weight, self.reduction = nn.Parameter(torch.randn(3, 4)), reduction

    def forward(self, f, y):
        cosine = F.linear(F.normalize(f), F.normalize(self.weight)).clamp(-0.99, 0.99)
        angle = cosine.acos() + 0.3 * F.one_hot(y, 3)
        return F.cross_entropy(8 * angle.cos(), y, reduction=self.reduction)


class TaskWeights(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.log_variances = nn.Parameter(torch.tensor([0.3, -0.4]))

    def forward(self, losses):
        parts = [torch.exp(-s) * loss + s for s, loss in zip(self.log_variances, losses)]
        return {"total": parts[0] + parts[1], "parts": parts}


class Proxies(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proxies = nn.Parameter(torch.randn(3, 4))

    def forward(self, f, y):
        return F.cross_entropy(-distances(f, F.normalize(self.proxies)).square(), y, reduction="sum")


class Temperature(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.log_temperature = nn.Parameter(torch.tensor(0.5))

    def forward(self, f):
        logits = F.normalize(f[::2]) @ F.normalize(f[1::2]).T * self.log_temperature.exp()
        return F.cross_entropy(logits, torch.arange(len(logits)))


class Likelihood(nn.Module):
    """A mixture with learned centres: log-likelihoods a sample."""

    def __init__(self) -> None:
        super().__init__()
        self.means, self.logits = nn.Parameter(torch.randn(5, 4)), nn.Parameter(torch.randn(5))

    def forward(self, f):
        return torch.logsumexp(self.logits.log_softmax(0) - distances(f, self.means).square(), 1)


class Quantized(nn.Module):
    """Vector quantization: straight through, with the loss that commits to the codebook."""

    def __init__(self) -> None:
        super().__init__()
        self.codebook = nn.Parameter(torch.randn(7, 4))

    def forward(self, z):
        index = torch.cdist(z.detach(), self.codebook).argmin(1)
        code = self.codebook[index]
        commitment = (z - code.detach()).square().mean() + (z.detach() - code).square().mean()
        return z + (code - z).detach(), commitment, index


class AutoEncoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)), nn.Linear(4, 6)
        self.quantize = Quantized()

    def forward(self, x):
        z, commitment, _ = self.quantize(self.encoder(x))
        return self.decoder(z), commitment


class TwoTowers(nn.Module):
    """As CLIP with ``return_loss``: the model owns the temperature and returns a record."""

    def __init__(self) -> None:
        super().__init__()
        self.image = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))
        self.text = nn.Linear(6, 4)
        self.logit_scale = nn.Parameter(torch.tensor(1.0))

    def forward(self, x, return_loss=True):
        a, b = (F.normalize(f(x), dim=1) for f in (self.image, self.text))
        logits, target = a @ b.T * self.logit_scale.exp(), torch.arange(len(x))
        loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        return {"loss": loss, "logits_per_image": logits, "embeds": (a, b)}


class ReturnsLoss(nn.Module):
    def __init__(self, reduction: str = "mean") -> None:
        super().__init__()
        self.token, self.body, self.reduction = nn.Parameter(torch.randn(6)), Classifier(), reduction

    def forward(self, x, y):
        return F.cross_entropy(self.body(x + self.token)[1].square(), y, reduction=self.reduction)


def _both(m, b):
    f, z = m(b[0])
    return F.cross_entropy(z, b[1]) + 0.3 * m.loss(f, b[1])


def _tasks(m, b):
    f, z = m(b[0])
    return m.loss([F.cross_entropy(z, b[1]), f.square().mean()])["total"]


def _autoencoder(m, b):
    y, commitment = m(b[0])
    return F.mse_loss(y, b[0]) + 0.25 * commitment


def _alone(m, b):
    return m.loss(m(b[0]), b[1])


CASES: dict[str, tuple[Callable[[], nn.Module], Loss]] = {
    "centre loss": (lambda: Classifier(Centres()), _both),
    "centre loss alone": (lambda: Body(Centres()), _alone),
    "centre loss a sample": (lambda: Body(Centres(False)), lambda m, b: _alone(m, b).mean()),
    "its logarithm": (lambda: Body(Centres()), lambda m, b: _alone(m, b).log()),
    "ArcFace": (lambda: Body(ArcFace()), _alone),
    "ArcFace a sample": (lambda: Body(ArcFace("none")), lambda m, b: (_alone(m, b) * (b[1] > 0)).sum()),
    "task weights": (lambda: Classifier(TaskWeights()), _tasks),
    "proxies": (lambda: Classifier(Proxies()), _both),
    "temperature": (lambda: Body(Temperature()), lambda m, b: m.loss(m(b[0]))),
    "log-likelihood": (lambda: Body(Likelihood()), lambda m, b: -m.loss(m(b[0])).mean()),
    "vector quantization": (AutoEncoder, _autoencoder),
    "two towers": (TwoTowers, lambda m, b: m(b[0])["loss"]),
    "the model's own": (ReturnsLoss, lambda m, b: m(*b)),
    "the model's own, a sample": (lambda: ReturnsLoss("none"), lambda m, b: m(*b).mean()),
}  # fmt: skip


def _made(name: str) -> tuple[nn.Module, Batch, Loss]:
    torch.manual_seed(0)
    build, loss = CASES[name]
    return build().double().eval(), (torch.randn(8, 6, dtype=torch.float64), torch.arange(8) % 3), loss


@pytest.mark.parametrize("name", CASES)
def test_traces_are_those_of_the_dense_hessian(name):
    net, batch, loss = _made(name)
    table = find_sites(net, lambda: loss(net, batch), 8)
    truth = dense_weight_traces(net, batch, loss, table) | dense_activation_traces(net, batch, loss, table)
    traces = measure(net, [batch], loss, sites=table, estimator="exact", progress=False)
    assert {r.name: r.trace for r in traces} == pytest.approx(truth, rel=1e-8)
    assert not any("disagree" in note for note in traces.notes)


def _unrecognised(kind: str) -> tuple[nn.Module, Loss]:
    """The curvature is made by modules that return what no network would, and the loss bends that again."""
    if kind == "focal":
        net = Body(ArcFace("none"))
        return net, lambda m, b: ((1 - torch.exp(-_alone(m, b))) ** 2 * _alone(m, b)).mean()
    if kind == "squared":
        return Body(Centres(False)), lambda m, b: _alone(m, b).square().mean()
    return Body(Likelihood()), lambda m, b: F.softplus(-m.loss(m(b[0]))).mean()


@pytest.mark.parametrize("kind", ["focal", "squared", "softplus"])
def test_curvature_that_the_traces_miss_is_told(kind):
    torch.manual_seed(0)
    net, loss = _unrecognised(kind)
    batch = torch.randn(8, 6, dtype=torch.float64), torch.arange(8) % 3
    notes = measure(net.double().eval(), [batch], loss, max_probes=8, progress=False).notes
    assert any("disagree" in note and "b.weight" in note for note in notes), notes


def test_the_check_takes_a_tenth_of_the_measurement_at_most():
    check_samples = internal("sensitivity._boundary_check").check_samples
    assert [check_samples(n, 64) for n in (1, 2, 8, 40, 512)] == [1, 2, 4, 4, 4]
    assert [check_samples(n, 1) for n in (8, 32, 48, 512)] == [1, 2, 3, 4]
