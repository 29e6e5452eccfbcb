"""Losses that are concave in places: the concave part is unbiased, also where it is not sent back with every probe."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from hawq_lightning import measure
from hawq_lightning.sensitivity import MeasureContext, OutputHessian, concave_share, find_sites, isolated_eval
from tests.cases import ConvNet, build, focal, image_batch, labels


def rare(model, batch):
    """Focal loss of a head that expects background, as detectors start: concave at the few positives alone."""
    return focal(6 * model(batch[0]) - 2.0, (F.one_hot(batch[1], 3) * (batch[1] == 0)[:, None]).double())


def often(model, batch):
    return focal(2 * model(batch[0]) - 3.0, F.one_hot(batch[1], 3).double())


def _batches():
    x, _ = image_batch(4)
    return [(x, labels(4)), (x.flip(0) * 0.7, labels(4))]


def _share(model, loss) -> float:
    batch = _batches()[0]
    with isolated_eval(model, 0):
        table = find_sites(model, lambda: loss(model, batch), 4)
        context = MeasureContext(model, {x.name: model.get_submodule(x.name) for x in table.layers}, table, loss)
        concave, whole = concave_share(context, batch)
    return concave / whole


@pytest.mark.parametrize(
    ("draw", "seeds"), [("all", 8), *(pytest.param(d, 24, marks=pytest.mark.stress) for d in ("all", "curvature"))]
)
def test_thinned_traces_are_unbiased_and_their_intervals_cover(draw, seeds):
    model = build(ConvNet)
    assert 0 < _share(model, rare) <= 0.05
    exact = measure(model, _batches(), rare, estimator="exact")
    truth = {s.name: s.trace for s in exact}
    sums: dict[str, list[float]] = {n: [] for n in truth}
    inside = total = 0
    for seed in range(seeds):
        found = measure(model, _batches(), rare, rtol=0.25, seed=seed, sampling=draw, max_probes=200)
        assert found.settings["probes"] % 8 == 0 or draw == "curvature"
        for s in found:
            sums[s.name].append((s.trace - truth[s.name]) / truth[s.name])
            inside += abs(s.trace - truth[s.name]) <= 1.96 * s.stderr
            total += 1
    for site, errors in sums.items():
        e = torch.tensor(errors)
        assert abs(float(e.mean())) <= 4 * float(e.std()) / len(e) ** 0.5, site
    assert 0.88 <= inside / total <= 1.0


@pytest.mark.parametrize(("loss", "each"), [(rare, 9 / 8), (often, 2.0)])
def test_backward_passes_of_a_probe(loss, each, monkeypatch):
    """One, and another every eighth time; two where much is concave."""
    model = build(ConvNet)
    assert (_share(model, loss) <= 0.05) == (loss is rare)
    passes = []
    plain = OutputHessian.backward
    monkeypatch.setattr(OutputHessian, "backward", lambda self, *a, **k: (passes.append(1), plain(self, *a, **k))[1])
    found = measure(model, _batches()[:2], loss, rtol=1e-9, max_probes=32, sampling="all")
    looks = 4  # whether any two of 4 images can be told apart
    assert len(passes) - looks == 2 * 32 * each
    assert found.settings["probes"] == 32
