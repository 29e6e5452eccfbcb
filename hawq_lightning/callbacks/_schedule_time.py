"""Moments of training: an epoch, or a share of the whole."""

from __future__ import annotations

import math

from lightning.pytorch import Trainer

from hawq_lightning._errors import HawqError


class ScheduleTime:
    """A point in training from which something holds.

    Args:
        value: an int is an epoch, counted from 0; a float from 0 to 1 or a string such as ``"80%"`` is a share of the
            whole training, by ``max_steps`` or ``max_epochs``.
        callback: class whose argument it is, for messages.
        argument: the argument's name.

    Raises:
        HawqError: neither of these.
    """

    def __init__(self, value: int | float | str, callback: str, argument: str) -> None:
        self.text = f"{callback}({argument}={value!r})"
        self._epoch: int | None = None
        self._share: float | None = None
        if isinstance(value, str) and value.strip().endswith("%"):
            try:
                value = float(value.strip()[:-1]) / 100
            except ValueError:
                value = math.nan
        if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
            self._epoch = value
        elif isinstance(value, float) and 0 <= value <= 1:
            self._share = value
        else:
            raise HawqError(
                f'{self.text} is no moment of training: give an epoch (0, 1, 2 ...), a share from 0.0 to 1.0, or "80%".'
            )

    def check(self, trainer: Trainer) -> None:
        """Raise HawqError if this training has no end that a share could refer to."""
        if self._share is not None and math.isnan(training_share(trainer)):
            raise HawqError(
                f"{self.text} is a share of the training, which has no known end here: give the Trainer "
                "max_epochs or max_steps, or give an epoch."
            )

    def reached(self, trainer: Trainer, batch_idx: int = 0) -> bool:
        """Whether training has come so far at the start of batch ``batch_idx``."""
        if self._epoch is not None:
            return trainer.current_epoch >= self._epoch
        return training_share(trainer, batch_idx) >= (self._share or 0.0)

    def as_share(self, trainer: Trainer) -> float:
        """The moment as a share of the training; 0 where the training has no known end."""
        if self._share is not None:
            return self._share
        if trainer.max_epochs is not None and trainer.max_epochs > 0:
            return min(1.0, (self._epoch or 0) / trainer.max_epochs)
        return 0.0


def training_share(trainer: Trainer, batch_idx: int = 0) -> float:
    """How much of the training lies behind the start of batch ``batch_idx``, 0 to 1; NaN if it has no known end."""
    shares = []
    if trainer.max_steps is not None and trainer.max_steps > 0:
        shares.append(trainer.global_step / trainer.max_steps)
    if trainer.max_epochs is not None and trainer.max_epochs > 0:
        batches = trainer.num_training_batches
        within = batch_idx / batches if batches and math.isfinite(batches) else 0.0
        shares.append((trainer.current_epoch + within) / trainer.max_epochs)
    if trainer.max_epochs == 0 or trainer.max_steps == 0:
        return 1.0
    return min(1.0, max(shares)) if shares else math.nan
