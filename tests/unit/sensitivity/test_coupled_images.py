"""Images that a loss or a network couples are no rows, wherever in the batch they stand."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from hawq_lightning import HawqError, measure

N = 6


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)).double()


def batch(n=N):
    x = torch.randn(n, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return x, torch.arange(n) % 3


def masked_dice(model, b):
    p = torch.sigmoid(model(b[0]))[1:]
    y = F.one_hot(b[1], 3).to(p)[1:]
    return 1 - (2 * (p * y).sum() + 1) / ((p + y).sum() + 1)


def paired(model, b):
    o = model(b[0])
    return F.cross_entropy(o, b[1]) + 0.5 * (o[-1] * o[-2]).sum()


def ranking(model, b):
    s = model(b[0])[1:, 0]
    i, j = torch.triu_indices(len(s), len(s), 1)
    return F.softplus(s[j] - s[i]).mean()


def cox(model, b):
    s = model(b[0])[:, 0]
    return torch.stack([torch.logsumexp(s[i:], 0) - s[i] for i in range(1, len(s) - 1)]).mean()


def triplet(model, b):
    z = model(b[0])
    d = (z[:, None] - z[None]).square().sum(-1)[1:, 1:]
    same = b[1][1:, None] == b[1][None, 1:]
    hardest = (d * same).amax(1) - d.masked_fill(same, 1e9).amin(1)
    return F.softplus(hardest).mean()


def one_pair(i, j):
    def loss(model, b):
        o = model(b[0])
        return F.cross_entropy(o, b[1]) + (o[i] * o[j]).sum()

    return loss


def dense(model, b, loss_fn):
    weight = model[0].weight
    (g,) = torch.autograd.grad(loss_fn(model, b), weight, create_graph=True)
    return sum(
        float(torch.autograd.grad(v, weight, retain_graph=True)[0].reshape(-1)[i]) for i, v in enumerate(g.reshape(-1))
    )


LOSSES = [masked_dice, paired, ranking, cox, triplet, one_pair(2, 4), one_pair(5, 1), one_pair(3, 4)]


@pytest.mark.parametrize("loss_fn", LOSSES)
def test_a_coupling_that_image_0_has_no_part_in_is_seen(loss_fn):
    model, b = net(), batch()
    measured = measure(model, [b], loss_fn, estimator="exact", progress=False)
    assert measured["0.weight"].trace == pytest.approx(dense(model, b, loss_fn), rel=1e-6)
    assert set(measured.row_unit.values()) == {"batch"}
    assert any("couples the images" in n for n in measured.notes)


@pytest.mark.parametrize("pair", [(30, 39), (0, 39), (17, 18)])
def test_a_pair_beyond_the_first_images_is_seen(pair):
    measured = measure(net(), [batch(40)], one_pair(*pair), rtol=1.0, progress=False)
    assert set(measured.row_unit.values()) == {"batch"}


def test_a_network_that_mixes_two_images_is_seen():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(4, 5), nn.Linear(5, 3)

        def forward(self, x):
            h = torch.relu(self.first(x))
            return self.last(torch.cat([h[:3], h[3:4] + h[4:5], h[4:]]))

    torch.manual_seed(0)
    measured = measure(Mixed().double(), [batch()], lambda m, b: F.cross_entropy(m(b[0]), b[1]), rtol=1.0)
    assert measured.row_unit["first.weight"] == "batch" and measured.row_unit["last.weight"] == "image"


def test_images_that_nothing_couples_stay_rows():
    for n in (2, 3, N, 40):
        model, b = net(), batch(n)
        measured = measure(model, [b], lambda m, b: F.cross_entropy(m(b[0]), b[1]), rtol=1.0, progress=False)
        assert set(measured.row_unit.values()) == {"image"}


def coupled_where_marked(model, b):
    o = model(b[0])
    pair = (o[2] * o[3]).sum() if b[0][0, 0] > 50 else 0.0
    return F.cross_entropy(o, b[1]) + pair


@pytest.mark.parametrize(("count", "marked"), [(2, 1), (5, 3), (9, 4), (20, 19)])
def test_a_coupling_that_comes_in_a_later_batch_is_seen(count, marked):
    model, batches = net(), [batch() for _ in range(count)]
    batches[marked][0][0, 0] = 60.0
    measured = measure(model, batches, coupled_where_marked, estimator="exact", progress=False)
    assert set(measured.row_unit.values()) == {"batch"}
    plain = dense(model, batches[0], coupled_where_marked)
    right = (plain * (count - 1) + dense(model, batches[marked], coupled_where_marked)) / count
    assert measured["0.weight"].trace == pytest.approx(right, rel=1e-6)


@pytest.mark.parametrize("estimator", ["exact", "ggn"])
def test_a_single_coupled_batch_among_many_is_refused_where_it_was_not_looked_at(estimator):
    model, batches = net(), [batch() for _ in range(30)]
    batches[15][0][0, 0] = 60.0
    with pytest.raises(HawqError, match="couples the images of batch 15"):
        measure(model, batches, coupled_where_marked, estimator=estimator, rtol=1.0, progress=False)
    again = measure(model, [batches[15], *batches], coupled_where_marked, estimator=estimator, rtol=1.0, progress=False)
    assert set(again.row_unit.values()) == {"batch"}


def rolled(step):
    return lambda x: x + torch.roll(x, step, 0)


def grouped(size):
    return lambda x: x + x.reshape(-1, size, x.shape[-1]).mean(1).repeat_interleave(size, 0)


def halves(x):
    first, second = x.chunk(2)
    return torch.cat([first + second, second])


class Mixing(nn.Module):
    def __init__(self, mix):
        super().__init__()
        self.first, self.second, self.mix = nn.Linear(4, 5), nn.Linear(5, 3), mix

    def forward(self, x):
        return self.second(self.mix(torch.relu(self.first(x))))


MIXES = [(n, rolled(k)) for n in (8, 12, 16) for k in (1, 2, 3, 4, 5, 6, 8, 10) if k < n]
MIXES += [(n, grouped(k)) for n in (8, 12, 16) for k in (2, 4)] + [(n, halves) for n in (8, 12, 16)]


@pytest.mark.parametrize(("samples", "mix"), MIXES)
def test_a_network_that_mixes_images_is_seen_on_a_few_of_them(samples, mix):
    torch.manual_seed(0)
    measured = measure(
        Mixing(mix), [(torch.randn(samples, 4), torch.arange(samples) % 3)], cross_entropy, progress=False
    )
    assert measured.row_unit["first.weight"] == "batch" and measured.row_unit["second.weight"] == "image"


def cross_entropy(model, b):
    return F.cross_entropy(model(b[0]), b[1])
