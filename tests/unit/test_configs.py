"""Configs are values: nothing of one can be assigned, and a changed copy is checked as a new one is."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, fields, replace

import pytest

from hawq_lightning import HawqError, MeasureConfig, QuantizerConfig, SelectConfig

CONFIGS = (QuantizerConfig, MeasureConfig, SelectConfig)


@pytest.mark.parametrize(("config", "field"), [(c, f.name) for c in CONFIGS for f in fields(c)])
def test_no_field_can_be_assigned_or_deleted(config, field):
    made = config()
    with pytest.raises(FrozenInstanceError, match=field):
        setattr(made, field, getattr(made, field))
    with pytest.raises(FrozenInstanceError, match=field):
        delattr(made, field)
    assert made == config()


@pytest.mark.parametrize("config", CONFIGS)
def test_nothing_can_be_added(config):
    with pytest.raises(FrozenInstanceError):
        config().budgets = "8x"


@pytest.mark.parametrize(
    ("config", "wrong"), [(QuantizerConfig(), {"weight_bits": 9}), (MeasureConfig(), {"rtol": 0}),
                          (SelectConfig(), {"budget": "8y"})],
)  # fmt: skip
def test_a_changed_copy_is_checked(config, wrong):
    with pytest.raises(HawqError):
        replace(config, **wrong)
