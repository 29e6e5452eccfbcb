"""Estimators of one's own, from one's own file; what they declare changes what the loop does with them."""

from __future__ import annotations

import math

import pytest
import torch

from hawq_lightning import HawqError, measure
from hawq_lightning.sensitivity import (
    ESTIMATORS,
    Estimator,
    Probes,
    ProbeVectors,
    backpropagate,
    forward_pass,
    register_estimator,
)
from tests.cases import CASES, ConvNet, batch_for, build, image_batch

_, CROSS_ENTROPY = CASES["cross_entropy"]


@register_estimator("test_signs")
class Signs(Estimator):
    """Gauss-Newton by the Cholesky factor of the softmax: a third way to the same traces."""

    per_sample_weights = True

    def probe(self, context, request):
        generator = request.generator()
        with forward_pass(context, request.batch, request.per_sample) as forward:
            sizes = {site: forward.network.sizes(site, request.samples) for site in forward.network.aliases()}
            (values,) = forward.hessian.values
            p = torch.softmax(values, -1)
            factor = torch.linalg.cholesky(torch.diag_embed(p) - p[:, :, None] * p[:, None, :] + 1e-14 * torch.eye(3))
            rows = []
            for _ in range(request.probes):
                z = torch.randint(0, 2, values.shape, generator=generator).mul(2).sub(1).to(values)
                vector = (factor @ z[..., None])[..., 0] / request.samples**0.5
                rows.append(backpropagate(forward, ProbeVectors([(1.0, [vector])])))
        return Probes(rows, sizes)


@register_estimator("test_squares")
class Squares(Signs):
    """Declares itself exact and takes one probe."""

    exact = True
    probes_per_step = 1


@register_estimator("test_twice")
class Twice(Estimator):
    """Needs what the network has not."""

    second_derivatives = True

    def probe(self, context, request):
        raise RuntimeError("derivative for grid_sampler is not implemented")


@pytest.fixture(scope="module")
def truth():
    return measure(build(ConvNet), [image_batch()], CROSS_ENTROPY, estimator="exact", progress=False)


def test_an_estimator_of_ones_own_gives_the_same_traces_within_its_errors(truth):
    found = measure(build(ConvNet), [image_batch()], CROSS_ENTROPY, estimator="test_signs", rtol=0.1, progress=False)
    assert found.settings["estimator"] == "test_signs" and found.settings["probes"] > 2
    assert found.row_unit["fc.weight"] == "image"
    for r in found:
        assert r.stderr > 0 and abs(r.trace - truth[r.name].trace) <= 4.5 * r.stderr + 1e-8 * r.trace, r


def test_what_is_declared_exact_takes_one_step_and_has_no_error():
    found = measure(build(ConvNet), [image_batch()], CROSS_ENTROPY, estimator="test_squares", progress=False)
    assert found.settings["stopped"] == "exact" and found.settings["probes"] == 1
    assert all(r.stderr == 0 and math.isfinite(r.stderr_data) for r in found)


def test_it_is_resumed_and_runs_in_parts_like_any_other(tmp_path):
    net, (x, y) = build(ConvNet), image_batch(8)
    whole = measure(net, [(x, y)], CROSS_ENTROPY, estimator="test_squares", progress=False)

    def small(model, batch):
        if len(batch[0]) > 4:
            raise torch.OutOfMemoryError("out of memory")
        return CROSS_ENTROPY(model, batch)

    parts = measure(net, [(x, y)], small, estimator="test_squares", progress=False)
    assert any("4 images at a time" in n for n in parts.notes)
    assert set(parts.rows) == set(whole.rows) and len(parts.rows["fc.weight"]) == 8
    calls = [0]

    def failing(model, batch):
        calls[0] += 1
        if calls[0] == 12:
            raise KeyboardInterrupt
        return CROSS_ENTROPY(model, batch)

    keywords = {"estimator": "test_signs", "rtol": 0.05, "progress": False}
    uninterrupted = measure(net, [(x, y)], CROSS_ENTROPY, **keywords)
    with pytest.raises(KeyboardInterrupt):
        measure(net, [(x, y)], failing, resume=tmp_path / "rows", **keywords)
    resumed = measure(net, [(x, y)], CROSS_ENTROPY, resume=tmp_path / "rows", **keywords)
    assert [r.trace for r in resumed] == [r.trace for r in uninterrupted]


def test_a_missing_second_derivative_is_one_clear_error():
    with pytest.raises(HawqError, match=r"estimator='test_twice' needs double backward.*grid_sampler"):
        measure(build(ConvNet), [image_batch()], CROSS_ENTROPY, estimator="test_twice", progress=False)


def test_drawing_from_an_estimator_that_cannot_is_refused():
    with pytest.raises(HawqError, match="'test_signs' has whole batches as rows"):
        measure(
            build(ConvNet), [image_batch()], CROSS_ENTROPY, estimator="test_signs", sampling="curvature", progress=False
        )


def test_names_are_checked_and_taken_once():
    assert {"auto", "ggn", "hessian", "hutchinson", "exact"} <= set(ESTIMATORS)
    with pytest.raises(HawqError, match="There is a estimator 'ggn' already|estimator 'ggn' already"):
        register_estimator("ggn")(type("Other", (Signs,), {}))
    assert ESTIMATORS["ggn"].name == "ggn"
    with pytest.raises(HawqError, match="is no name"):
        register_estimator("My estimator")(type("Other", (Signs,), {}))
    with pytest.raises(HawqError, match=r"no estimator 'test_sings'.*Did you mean 'test_signs'"):
        measure(build(ConvNet), [batch_for(ConvNet)], CROSS_ENTROPY, estimator="test_sings", progress=False)


def test_unknown_keywords_of_measure_name_the_nearest():
    with pytest.raises(HawqError, match=r"measure\(\) takes no 'rtoll'.*Did you mean 'rtol'"):
        measure(build(ConvNet), [image_batch()], CROSS_ENTROPY, rtoll=0.1)
