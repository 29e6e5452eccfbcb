"""Random states in checkpoints, which Lightning's leave out: a resumed epoch draws what it would have drawn."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn

from hawq_lightning._types import StateDict
from hawq_lightning.callbacks._trainer import (
    after_last_batch,
    at_epoch_end,
    gathered,
    in_middle_of_epoch,
    renew_train_iterator,
    train_loaders,
)

KEY = "hawq_lightning_random_states"


def random_states() -> StateDict:
    """Torch's, NumPy's and Python's states, in types that ``weights_only=True`` loads."""
    state: Any = np.random.get_state()
    kind, keys, position, has_gauss, cached = state
    version, internal, gauss = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
        "numpy": [str(kind), torch.tensor(keys.astype(np.int64)), int(position), int(has_gauss), float(cached)],
        "python": [int(version), list(internal), gauss],
    }


def set_random_states(states: StateDict) -> None:
    """Put back what :func:`random_states` gave."""
    torch.set_rng_state(states["torch"].cpu())
    if states["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(states["cuda"])
    kind, keys, position, has_gauss, cached = states["numpy"]
    np.random.set_state((kind, keys.cpu().numpy().astype(np.uint32), position, has_gauss, cached))
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))


class ResumedStates:
    """What a callback does so that a resumed training draws what an undisturbed one would have drawn.

    Checkpoints from the end of an epoch are followed by a new epoch, whose iterator draws first; those from the middle
    of one are followed by its next batch, and those from the validation after its last batch by the hooks at its end.
    Each process has states of its own.
    """

    def __init__(self) -> None:
        self._states: StateDict | None = None
        self._middle = self._after_last = False
        self._doubts: list[str] = []

    def before_data(self, trainer: Trainer) -> None:
        """Before the resumed epoch's iterator is made, or in place of one that was made too early."""
        if self._states is not None and not self._middle:
            set_random_states(self._states)
            renew_train_iterator(trainer)

    def iterator_stands(self, trainer: Trainer) -> None:
        """In ``on_train_start``, where an undisturbed run would not come by: what is drawn here must not count."""
        if self._middle:
            self._middle = False
            stateless = sorted({type(x).__name__ for x in train_loaders(trainer) if not hasattr(x, "load_state_dict")})
            if stateless:
                self._doubts.append(
                    f"{' and '.join(stateless)} cannot tell where in the epoch it was (torchdata's StatefulDataLoader "
                    "can), so the images come in another order"
                )
            if self._doubts:
                rank_zero_warn(
                    f"HAWQ: training goes on in the middle of epoch {trainer.current_epoch}, and its weights will not "
                    f"be those of an undisturbed run: {'; '.join(self._doubts)}. Checkpoints from the end of an epoch "
                    "have no such limits."
                )
            if self._states is not None:
                set_random_states(self._states)
                self._states = None
        elif self._states is not None and not self._after_last:
            self._states = random_states()

    def epoch_ends(self) -> None:
        """Of an epoch that goes on behind its last batch: the next one makes an iterator of its own."""
        if self._after_last and self._states is not None:
            set_random_states(self._states)
            self._states = None

    def epoch_starts(self) -> None:
        """Nothing that was drawn since the iterator stood counts."""
        if self._states is not None:
            set_random_states(self._states)
            self._states = None

    def save(self, trainer: Trainer, checkpoint: StateDict) -> None:
        """Write the states of all processes into a checkpoint; every process calls this."""
        checkpoint[KEY] = {"middle": not at_epoch_end(trainer)} | gathered(trainer, random_states())

    def load(self, trainer: Trainer, checkpoint: StateDict) -> None:
        """Take this process's states out of a checkpoint."""
        if trainer.state.fn != "fit":
            return
        self._states, self._doubts, saved = None, [], checkpoint.get(KEY)
        self._middle, self._after_last = in_middle_of_epoch(checkpoint), after_last_batch(checkpoint)
        if saved is None:
            self._doubts.append("the checkpoint holds no random states")
            return
        states = saved.get("ranks", [saved])
        if len(states) == trainer.world_size:
            self._states = states[trainer.global_rank]
        else:
            self._doubts.append(f"it was written by {len(states)} processes, and these are {trainer.world_size}")


class KeepRandomStates(Callback):
    """Fits without a plan resume with the random states that they stopped with, as :class:`ApplyPlan` does."""

    def __init__(self) -> None:
        self._resumed = ResumedStates()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Before the resumed epoch's iterator is made."""
        self._resumed.before_data(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The iterator stands."""
        self._resumed.iterator_stands(trainer)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Nothing that was drawn since then counts."""
        self._resumed.epoch_starts()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Of an epoch that was resumed behind its last batch."""
        self._resumed.epoch_ends()

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: StateDict) -> None:
        """Of all processes."""
        self._resumed.save(trainer, checkpoint)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: StateDict) -> None:
        """See :meth:`on_save_checkpoint`."""
        self._resumed.load(trainer, checkpoint)
