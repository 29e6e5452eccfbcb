"""Traces and perturbations are paired by sample where they are of the same batches; a shuffling loader is told of."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import hawq_lightning as hl
from hawq_lightning.sensitivity import Sensitivity

SAMPLES, BATCH = 24, 6
OTHERS = "measured on other batches than these"


def net():
    with torch.random.fork_rng():  # loaders go on to draw other orders
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)).eval()


def data():
    """Samples of very unequal size, so that it matters what is paired with what."""
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(SAMPLES, 5, generator=draw) * torch.logspace(-1, 1.5, SAMPLES)[:, None]
    return TensorDataset(x, torch.randint(0, 3, (SAMPLES,), generator=draw))


def mean_loss(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def coupled(model, batch):
    """Whole batches are the rows."""
    y = model(batch[0])
    return F.cross_entropy(y, batch[1]) + (y - y.mean(0)).square().mean()


def measured(batches, loss_fn=mean_loss):
    return hl.measure(net(), batches, loss_fn, estimator="exact", progress=False, batch_size_fn=size)


def size(batch):
    return len(batch.x if isinstance(batch, Noted) else batch[0])


def omegas(batches, traces, loss_fn=mean_loss, **settings):
    model = net()
    weighed = hl.candidates(
        model, batches, traces, hl.sites(model, data().tensors), loss_fn, batch_size_fn=size, **settings
    )
    return {(name, c.bits): (c.omega, c.perturbation) for name, of in weighed.items() for c in of}


def loaders():
    shuffling = DataLoader(data(), BATCH, shuffle=True)
    yield "shuffling loader", shuffling, shuffling
    drawn = [*shuffling]
    yield "other order", drawn, drawn[::-1]
    yield "other samples", drawn, [(x + 1, y) for x, y in drawn]
    yield "other labels", drawn, [(x, (y + 1) % 3) for x, y in drawn]
    yield "objects", [Noted(*batch) for batch in drawn], [Noted(*batch) for batch in drawn[::-1]]
    yield "augmented", drawn, [(x + 0.01 * torch.randn_like(x), y) for x, y in drawn]


class Noted:
    """A batch of somebody's own that counts and notes whatever is done with it."""

    def __init__(self, x, y):
        self.x, self.y, self.notes, self.count = x, y, [], 0

    def __getitem__(self, i):
        self.count += 1
        self.notes.append((self.count, {self.count}))
        self.more = [self.count]
        return (self.x, self.y)[i]


def paired():
    in_order = DataLoader(data(), BATCH)
    drawn = [*DataLoader(data(), BATCH, shuffle=True)]
    yield "list", drawn, drawn
    yield "loader in order", in_order, in_order
    yield "generator", iter(drawn), iter(drawn)
    yield "copies", drawn, copy.deepcopy(drawn)
    yield "tuple", drawn, tuple(drawn)
    noted = [Noted(*batch) for batch in drawn]
    yield "objects that count", noted, noted


@pytest.mark.parametrize("loss_fn", [mean_loss, coupled])
def test_other_batches_are_told_of_and_not_paired(loss_fn):
    for name, first, again in loaders():
        traces = measured(first, loss_fn)
        with pytest.warns(UserWarning, match=OTHERS) as told:
            found = omegas(again, traces, loss_fn, activation_bits=(3, 8))
        assert len(told) == 1 and "list(loader)" in str(told[0].message), name
        for (site, bits), (omega, perturbation) in found.items():
            if site.endswith("input"):
                assert omega == pytest.approx(traces[site].mean_trace * perturbation), (name, site, bits)


@pytest.mark.parametrize("loss_fn", [mean_loss, coupled])
def test_the_same_batches_are_paired_by_sample(loss_fn):
    for name, first, again in paired():
        traces = measured(first, loss_fn)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found = omegas(again, traces, loss_fn)
        means = [traces[s].mean_trace * p for (s, _), (_, p) in found.items() if s.endswith("input")]
        values = [omega for (s, _), (omega, _) in found.items() if s.endswith("input")]
        assert values != pytest.approx(means, rel=1e-3), name


def test_files_tell_of_the_batches_and_those_without_do_as_before(tmp_path):
    drawn = [*DataLoader(data(), BATCH)]
    traces = measured(drawn)
    traces.save(tmp_path / "traces.json")
    read = Sensitivity.load(tmp_path / "traces.json")
    assert read.data == traces.data and len(read.data) == 32
    with pytest.warns(UserWarning, match=OTHERS):
        omegas(drawn[::-1], read)
    old = Sensitivity.from_dict({k: v for k, v in read.to_dict().items() if k != "data"})
    assert not old.data and omegas(drawn, old) == omegas(drawn, read)


def test_nothing_is_said_where_nothing_is_paired():
    drawn = [*DataLoader(data(), BATCH)]
    traces = measured(drawn)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        omegas(drawn[:-1], traces)  # of fewer samples
        omegas(drawn[::-1], traces, activation_bits=None)
        omegas(drawn[::-1], None)


def test_no_batches_is_one_sentence():
    drawn = iter([*DataLoader(data(), BATCH)])
    traces = measured(drawn)
    with pytest.raises(hl.HawqError, match="was read before, as a generator is"):
        omegas(drawn, traces)


@pytest.mark.parametrize("after", ["quantizing", "batchnorm"])
def test_a_forecast_reads_a_shuffling_loader_once(after):
    model, loader = net(), DataLoader(data(), BATCH, shuffle=True)
    table = hl.sites(model, data().tensors)
    weighed = hl.candidates(model, [*loader], None, table, mean_loss)
    found = hl.forecast(model, loader, mean_loss, table, weighed, after=after)
    assert found.of(dict.fromkeys(weighed, 8)) >= 0
