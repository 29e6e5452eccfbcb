"""Random states in checkpoints, which Lightning's leave out: a resumed epoch draws what it would have drawn."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch


def random_states() -> dict[str, Any]:
    """Torch's, NumPy's and Python's states, in types that ``weights_only=True`` loads."""
    state: Any = np.random.get_state()
    kind, keys, position, has_gauss, cached = state
    version, internal, gauss = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() and torch.cuda.is_initialized() else [],
        "numpy": [str(kind), torch.tensor(keys.astype(np.int64)), int(position), int(has_gauss), float(cached)],
        "python": [int(version), list(internal), gauss],
    }


def set_random_states(states: dict[str, Any]) -> None:
    """Put back what :func:`random_states` gave."""
    torch.set_rng_state(states["torch"].cpu())
    if states["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(states["cuda"])
    kind, keys, position, has_gauss, cached = states["numpy"]
    np.random.set_state((kind, keys.cpu().numpy().astype(np.uint32), position, has_gauss, cached))
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
