"""``measure`` has the defaults of its config, and no others."""

from __future__ import annotations

from hawq_lightning import MeasureConfig, measure
from tests.cases import CASES, ConvNet, build, image_batch

_, CROSS_ENTROPY = CASES["cross_entropy"]


def test_a_bare_call_measures_as_the_config_says():
    bare = measure(build(ConvNet), [image_batch()], CROSS_ENTROPY, progress=False)
    configured = measure(build(ConvNet), [image_batch()], CROSS_ENTROPY, config=MeasureConfig(), progress=False)
    assert bare.fingerprint == configured.fingerprint and bare.settings["l1"] == MeasureConfig().l1_curvature
    assert [r.trace for r in bare] == [r.trace for r in configured]


def test_keywords_override_fields_of_a_config():
    net, batches = build(ConvNet), [image_batch()]
    config = MeasureConfig(estimator="exact", seed=3)
    found = measure(net, batches, CROSS_ENTROPY, config=config, seed=5, exclude="stem", progress=False)
    assert found.settings["estimator"] == "exact" and found.settings["seed"] == 5
    assert "stem.weight" not in found
