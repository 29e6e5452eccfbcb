"""Losses that autograd differentiates once: traces are those of the same loss written so that it can be done twice."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from hawq_lightning import HawqError, measure
from hawq_lightning.sensitivity import find_sites
from tests.cases import dense_weight_traces

Batch = tuple[torch.Tensor, torch.Tensor]
Loss = Callable[[nn.Module, Batch], torch.Tensor]
TARGETS = torch.tensor([[1, 2], [2, 2], [3, 1]])


def _ctc(m, b):
    return F.ctc_loss(m(b[0]).log_softmax(-1).transpose(0, 1), TARGETS, torch.full((3,), 6), torch.full((3,), 2))


def _ctc_by_hand(m, b):
    """The forward recursion over the extended targets (Graves et al., 2006), averaged as torch does."""
    logits, total = m(b[0]).log_softmax(-1), 0
    for row, target in zip(logits, TARGETS):
        states = [0, int(target[0]), 0, int(target[1]), 0]
        never = torch.full((), -1e30, dtype=row.dtype)
        alpha = [row[0, 0], row[0, states[1]], never, never, never]
        for t in range(1, len(row)):
            new = []
            for s, label in enumerate(states):
                into = alpha[max(0, s - 1) : s + 1]
                if s > 1 and label and label != states[s - 2]:
                    into = [alpha[s - 2], *into]
                new.append(torch.logsumexp(torch.stack(into), 0) + row[t, label])
            alpha = new
        total = total - torch.logaddexp(alpha[-1], alpha[-2]) / len(target)
    return total / len(TARGETS)


def _margin(m, b):
    return F.multi_margin_loss(m(b[0]).mean(1), b[1], p=2)


def _margin_by_hand(m, b):
    z = m(b[0]).mean(1)
    right = z.gather(1, b[1][:, None])
    return ((1 - right + z).clamp_min(0).square().sum(1) - 1).mean() / z.shape[1]


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return F.softplus(x).square()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return grad * 2 * F.softplus(x) * torch.sigmoid(x)


class _Hidden(_Once):
    """As fused kernels do it: the gradient is made beforehand, and a constant for autograd."""

    @staticmethod
    def forward(ctx, x):
        ctx.slope = (2 * F.softplus(x) * torch.sigmoid(x)).detach()
        return F.softplus(x).square()

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.slope


class _NumPy(_Once):
    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return torch.from_numpy(grad.numpy() * (2 * F.softplus(x) * torch.sigmoid(x)).numpy())


class Pool(nn.Module):
    """Attention with no layer behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.kv = nn.Linear(5, 8)

    def forward(self, x: torch.Tensor, plain: bool = False) -> torch.Tensor:
        k, v = self.kv(x)[:, None].chunk(2, -1)
        if plain:
            return (k[..., :1, :] @ k.mT / 2).softmax(-1) @ v
        return F.scaled_dot_product_attention(k[..., :1, :], k, v)


def _by(function: type[torch.autograd.Function]) -> Loss:
    return lambda m, b: function.apply(m(b[0])).mean()


def _softplus(m, b):
    return F.softplus(m(b[0])).square().mean()


CASES: dict[str, tuple[Callable[[], nn.Module] | None, Loss, Loss]] = {
    "ctc_loss": (None, _ctc, _ctc_by_hand),
    "multi_margin_loss": (None, _margin, _margin_by_hand),
    "_Once": (None, _by(_Once), _softplus),
    "_Hidden": (None, _by(_Hidden), _softplus),
    "numpy": (None, _by(_NumPy), _softplus),
    "attention": (Pool, lambda m, b: m(b[0]).square().mean(), lambda m, b: m(b[0], True).square().mean()),
}


def _made(name: str, dtype: torch.dtype) -> tuple[nn.Module, Batch, Loss, Loss]:
    torch.manual_seed(0)
    build, loss, twice = CASES[name]
    net = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 4)) if build is None else build()
    return net.to(dtype).eval(), (torch.randn(3, 6, 5, dtype=dtype), torch.tensor([1, 0, 3])), loss, twice


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_traces_are_those_of_the_loss_written_out(name, dtype):
    net, batch, loss, twice = _made(name, dtype)
    table = find_sites(net, lambda: loss(net, batch), 3)
    truth = dense_weight_traces(net, batch, twice, table)
    traces = measure(net, [batch], loss, sites=table, estimator="exact", progress=False)
    rel = 1e-4 if dtype == torch.float64 else 1e-2
    assert {n: traces[n].trace for n in truth} == pytest.approx(truth, rel=rel)
    differences = [n for n in traces.notes if "central differences" in n]
    if name == "attention":  # plain operations can be differentiated twice
        assert not differences and "loss_hessian" not in traces.settings
    else:
        assert len(differences) == 1 and name in differences[0], traces.notes
        assert traces.settings["loss_hessian"] == "finite differences"


@pytest.mark.parametrize("name", ["multi_margin_loss", "_Hidden"])
def test_auto_falls_back_and_double_backward_refuses(name):
    net, batch, loss, twice = _made(name, torch.float64)
    truth = measure(net, [batch], twice, estimator="exact", progress=False)
    for r in measure(net, [batch], loss, max_probes=16, progress=False):
        assert abs(r.trace - truth[r.name].trace) <= 4.5 * r.stderr + 1e-3 * truth[r.name].trace
    with pytest.raises(HawqError, match=f"{name}.*estimator='ggn'"):
        measure(net, [batch], loss, estimator="hutchinson", progress=False)


def test_a_hinge_counts_by_its_slope_and_its_kinks_do_not():
    net, batch, _, _ = _made("multi_margin_loss", torch.float32)
    traces = measure(net, [batch], lambda m, b: F.multi_margin_loss(m(b[0]).mean(1), b[1]), progress=False)
    assert any("no curvature in the output of 2" in n for n in traces.notes)
    assert all(r.trace > 0 for r in traces)


def test_a_later_batch_may_be_the_first_without_a_second_derivative():
    net, batch, loss, _ = _made("ctc_loss", torch.float64)

    def either(m, b):
        return loss(m, b) if float(b[1].sum()) else m(b[0]).square().mean()

    other = batch[0], torch.zeros(3)
    traces = measure(net, [other, batch], either, max_probes=8, progress=False)
    assert traces.settings["loss_hessian"] == "finite differences"


def test_random_draws_of_the_loss_are_the_same_at_moved_outputs():
    net, batch, _, _ = _made("ctc_loss", torch.float64)

    def noisy(function: Callable[[torch.Tensor], torch.Tensor]) -> Loss:
        return lambda m, b: function(m(b[0]) + torch.randn_like(b[0][..., :4])).mean()

    once = measure(net, [batch], noisy(_Hidden.apply), estimator="exact", progress=False)
    twice = measure(net, [batch], noisy(lambda x: F.softplus(x).square()), estimator="exact", progress=False)
    assert once["0.weight"].trace == pytest.approx(twice["0.weight"].trace, rel=0.2)  # of other draws
