"""Random generators that somebody holds, put back to where they were."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial

import numpy as np
import torch


def generator_put_back(value: object) -> Callable[[], object] | None:
    """What gives a torch, NumPy or Python generator the state that it has now; ``None`` for anything else.

    Args:
        value: any object.
    """
    if isinstance(value, torch.Generator):
        return partial(value.set_state, value.get_state())
    if isinstance(value, np.random.Generator):
        return partial(setattr, value.bit_generator, "state", value.bit_generator.state)
    if isinstance(value, np.random.RandomState):
        return partial(value.set_state, value.get_state())
    if isinstance(value, random.Random):
        return partial(value.setstate, value.getstate())
    return None
