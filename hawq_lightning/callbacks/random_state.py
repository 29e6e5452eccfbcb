"""Random states in checkpoints, which Lightning's leave out: a resumed epoch draws what it would have drawn."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from hawq_lightning.callbacks._lightning import at_epoch_end

_KEY = "hawq_lightning_random_states"


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


class KeepRandomStates(Callback):
    """Fits without a plan resume with the random states that they stopped with, as :class:`InstallPlan` does."""

    def __init__(self) -> None:
        self._states: dict[str, Any] | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Before the resumed epoch's iterator is made."""
        if self._states is not None:
            set_random_states(self._states)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The iterator stands."""
        if self._states is not None:
            self._states = random_states()

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Nothing that was drawn since then counts."""
        if self._states is not None:
            set_random_states(self._states)
            self._states = None

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """For checkpoints from which an epoch starts afresh."""
        if trainer.world_size == 1 and at_epoch_end(trainer):
            checkpoint[_KEY] = random_states()

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """See :meth:`on_save_checkpoint`."""
        if trainer.state.fn == "fit" and trainer.world_size == 1:
            self._states = checkpoint.get(_KEY)
