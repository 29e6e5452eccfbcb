"""The hash by which traces are recognised as those of a model."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import weight_norm

from hawq_lightning.callbacks import weights_hash


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


# hooks remake the weight; the parametrization that torch advises does not
@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning")
def test_a_models_hash_is_that_of_what_a_hook_makes_its_weights_of():
    first = nn.Sequential(weight_norm(nn.Linear(4, 4)))
    again = nn.Sequential(weight_norm(nn.Linear(4, 4)))
    again.load_state_dict(first.state_dict())  # its weight is still the old one
    assert weights_hash(again) == weights_hash(first) != weights_hash(nn.Sequential(weight_norm(nn.Linear(4, 4))))
