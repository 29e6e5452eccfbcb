"""A second fit: of the same model, of another model, with another callback."""

from __future__ import annotations

import copy
import random

import numpy as np
import pytest
import torch

from hawq_lightning.quantization import enabled_bits, quantized_layers
from tests.trainers import Classifier, assert_mixed, fit, hawq, loader, measuring, trainer


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)


@pytest.mark.feature("Checkpoints", "a second `fit`", "goes on with the same plan")
def test_a_second_fit_goes_on_with_the_same_plan(tmp_path):
    model, callback = Classifier(), hawq()
    trainer(tmp_path, callback).fit(model, loader())
    plan = callback.plan
    trainer(tmp_path, callback).fit(model, loader())
    assert callback.plan is plan
    assert_mixed(model, callback)
    fresh = hawq()
    with pytest.warns(UserWarning, match="keeps their bits"):
        trainer(tmp_path, fresh).fit(model, loader())
    assert [(s.name, s.bits) for s in fresh.plan.weights] == [(s.name, s.bits) for s in plan.weights]
    for cost in ("weight_bytes", "float_weight_bytes"):
        assert fresh.plan.costs[cost] == plan.costs[cost]


def test_a_callback_used_again_quantizes_the_second_model(tmp_path):
    callback = hawq(start_epoch=1)
    for width in (16, 20):
        model = Classifier(width)
        trainer(tmp_path, callback, max_epochs=2).fit(model, loader())
        assert_mixed(model, callback)
        assert callback.plan["net.0.weight"].shape == (width, 12)


def test_a_model_that_is_armed_already_keeps_its_bits_and_says_so(tmp_path):
    model = Classifier()
    fit(tmp_path, model, loader())
    known = enabled_bits(model)
    with pytest.warns(UserWarning, match="keeps their bits"):
        trainer(tmp_path, hawq(budget="5x")).fit(model, loader())
    assert enabled_bits(model) == known


def test_measuring_on_an_armed_model_leaves_it_armed(tmp_path):
    model = Classifier()
    trainer(tmp_path, hawq()).fit(model, loader())
    before = enabled_bits(model)
    callback = measuring(loss_per_site=True, dirpath=tmp_path)
    trainer(tmp_path, callback).fit(model, loader())
    again = copy.deepcopy(model)
    for layer in quantized_layers(again).values():
        layer.weight_quantizer.refresh(), layer.input_quantizer.refresh()
    assert enabled_bits(again) == enabled_bits(model) == before


def test_a_callback_on_a_model_that_is_armed_otherwise_tells_that_plan(tmp_path):
    first, second = Classifier(), Classifier()
    callback, other = hawq(weight_bits=4, budget="8x"), hawq(weight_bits=2, budget="16x")
    trainer(tmp_path, callback).fit(first, loader())
    trainer(tmp_path, other).fit(second, loader())
    trainer(tmp_path, callback).fit(second, loader())
    assert {s.bits for s in callback.plan.weights} == {2}
