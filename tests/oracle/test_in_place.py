"""Outputs and inputs of layers that are changed in place, views of something else among them: traces stay exact."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from hawq_lightning import measure
from hawq_lightning.sensitivity import find_sites
from tests.cases import dense_activation_traces, dense_weight_traces

Tensor = torch.Tensor


def _add(h: Tensor, x: Tensor) -> Tensor:
    h += x
    return h


def _times(h: Tensor, x: Tensor) -> Tensor:
    h *= 1.5
    return h


def _slice_zero(h: Tensor, x: Tensor) -> Tensor:
    h[:, 0] = 0
    return h


def _slice_relu(h: Tensor, x: Tensor) -> Tensor:
    h[..., 2:].relu_()
    return h


def _slice_of_another(h: Tensor, x: Tensor) -> Tensor:
    out = torch.zeros_like(h)
    out[..., :4] = h[..., :4]
    out[..., 4:] += 2 * h[..., 4:]
    return out


def _parts(h: Tensor, x: Tensor) -> Tensor:
    a, b = h.chunk(2, -1)
    return torch.cat([a.clone().relu_(), b * 2], -1)


CHANGES = {
    "relu_": lambda h, x: F.relu_(h),
    "add": _add,
    "times": _times,
    "masked_fill_": lambda h, x: h.masked_fill_(x > 0.5, 0.0),
    "slice_zero": _slice_zero,
    "slice_relu": _slice_relu,
    "slice_of_another": _slice_of_another,
    "parts": _parts,
    "view_then_relu_": lambda h, x: F.relu_(h.flatten(1)).view_as(h),
    "transposed_add": lambda h, x: h.transpose(-1, -2).add_(x.transpose(-1, -2)).transpose(-1, -2),
    "twice": lambda h, x: F.leaky_relu_(_add(h, x), 0.3),
}


class Mixed(nn.Module):
    """A layer whose output is changed in place, and a last layer whose output is, too."""

    def __init__(self, layer: nn.Module, change: str, last: str) -> None:
        super().__init__()
        self.stem, self.up, self.out = nn.Linear(6, 6), layer, nn.Linear(6, 3)
        self.change, self.last = change, last

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x), inplace=self.last == "relu_")
        h = CHANGES[self.change](self.up(x), x)
        y = self.out(h)
        if self.last == "div_":
            y.div_(0.7)
        elif self.last == "mask":
            y[:, 0] = 0.1
        return y


def _mean_of_rows(m: nn.Module, b: tuple[Tensor, Tensor]) -> Tensor:
    y = m(b[0])
    return F.cross_entropy(y.flatten(0, -2), b[1].repeat_interleave(y.flatten(0, -2).shape[0] // len(b[1])))


def _layer(kind: str) -> nn.Module:
    return {
        "linear": lambda: nn.Linear(6, 6),
        "bare": lambda: nn.Linear(6, 6, bias=False),
        "conv": lambda: nn.Conv1d(5, 5, 3, padding=1),
    }[kind]()


def _check(net: nn.Module, batch: tuple[Tensor, Tensor], loss_fn, estimator: str = "exact", **settings) -> None:
    table = find_sites(net, lambda: loss_fn(net, batch), len(batch[1]))
    truth = dense_weight_traces(net, batch, loss_fn, table) | dense_activation_traces(net, batch, loss_fn, table)
    got = measure(net, [batch], loss_fn, sites=table, estimator=estimator, progress=False, **settings)
    for record in got:
        exact = truth[record.name]
        if estimator == "exact":
            assert record.trace == pytest.approx(exact, rel=1e-8, abs=1e-12), record.name
        else:
            assert abs(record.trace - exact) <= 4.5 * record.stderr + 1e-9, record
    assert any(abs(v) > 1e-4 for v in truth.values())
    assert not any("zero curvature" in note for note in got.notes)


@pytest.mark.parametrize(
    "kind, change, last",
    [
        (kind, change, last)
        for (i, change), (j, kind) in itertools.product(enumerate(CHANGES), enumerate(["linear", "bare", "conv"]))
        for last in [["none", "div_", "mask", "relu_"][(i + j) % 4]]
    ],
)
def test_an_output_that_is_changed_in_place_keeps_its_trace(kind, change, last):
    torch.manual_seed(0)
    net = Mixed(_layer(kind), change, last).double()
    _check(net, (torch.randn(4, 5, 6, dtype=torch.float64), torch.arange(4) % 3), _mean_of_rows)


class TwoReaders(nn.Module):
    """Two layers read one tensor that is changed in place between and after the reads."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = 1.0 * torch.relu(self.a(x))
        g = self.b(h)
        h += 0.5 * g
        h.mul_(1.1)
        return self.c(h)


@pytest.mark.parametrize("estimator", ["exact", "hutchinson", "hessian", "auto"])
def test_what_frozen_layers_read_may_change_afterwards(estimator):
    torch.manual_seed(0)
    net = TwoReaders().double().requires_grad_(False)  # otherwise training could not do it either
    net.c.requires_grad_(True)
    batch = (torch.randn(4, 5, 4, dtype=torch.float64), torch.arange(4) % 3)
    table = find_sites(net, lambda: _mean_of_rows(net, batch), 4)
    frozen = TwoReaders().double()
    frozen.load_state_dict(net.state_dict())

    def copied(m: nn.Module, b: tuple[Tensor, Tensor]) -> Tensor:
        h = torch.relu(m.a(b[0]))
        y = m.c((h + 0.5 * m.b(h)) * 1.1)
        return F.cross_entropy(y.flatten(0, -2), b[1].repeat_interleave(5))

    truth = dense_weight_traces(frozen, batch, copied, table) | dense_activation_traces(frozen, batch, copied, table)
    got = measure(
        net, [batch], _mean_of_rows, sites=table, estimator=estimator, rtol=0.1, max_probes=100, progress=False
    )
    for record in got:
        assert abs(record.trace - truth[record.name]) <= 4.5 * record.stderr + 1e-9, record


class Pictures(nn.Module):
    """An embedding that is changed in place, and a convolution without a batch axis."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.conv, self.out = nn.Embedding(7, 6), nn.Conv1d(5, 5, 3, padding=1), nn.Linear(6, 3)

    def forward(self, ids: Tensor) -> Tensor:
        h = self.words(ids)
        h *= 2
        h += 0.1
        rows = []
        for image in h:
            row = self.conv(image)
            row.relu_()
            rows.append(row)
        return self.out(torch.stack(rows))


def test_an_embedding_and_layers_without_a_batch_axis_may_be_changed_in_place():
    torch.manual_seed(0)
    net = Pictures().double()
    _check(net, (torch.arange(20).reshape(4, 5) % 7, torch.arange(4) % 3), _mean_of_rows)


def test_what_an_earlier_hook_keeps_for_the_loss_is_the_tensor_that_is_measured():
    torch.manual_seed(0)
    net = Mixed(nn.Linear(6, 6), "parts", "none").double()
    kept: dict[str, Tensor] = {}
    net.up.register_forward_hook(lambda module, args, out: kept.update(h=out))

    def loss_fn(m: nn.Module, b: tuple[Tensor, Tensor]) -> Tensor:
        return _mean_of_rows(m, b) + 0.3 * kept["h"].square().mean()

    _check(net, (torch.randn(4, 5, 6, dtype=torch.float64), torch.arange(4) % 3), loss_fn)


def test_one_number_an_image_may_be_an_output():
    class Flow(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale, self.shift = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            log_scale = torch.tanh(self.scale(x))
            return x * log_scale.exp() + self.shift(x), log_scale.sum(1)

    class Density(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.flow = Flow()

        def forward(self, x: Tensor) -> Tensor:
            z, log_determinant = self.flow(x)
            return log_determinant - 0.5 * z.square().sum(1)

    torch.manual_seed(0)
    net = Density().double()
    batch = (torch.randn(6, 3, dtype=torch.float64), torch.zeros(6))
    for loss_fn in (lambda m, b: -m(b[0]).mean(), lambda m, b: (m(b[0]) - 1).square().mean()):
        got = measure(net, [batch], loss_fn, progress=False, max_probes=20)
        assert all(record.numel for record in got)
