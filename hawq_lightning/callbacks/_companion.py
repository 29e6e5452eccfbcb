"""What the callbacks beside ``HAWQ`` and ``ApplyPlan`` have in common."""

from __future__ import annotations

from lightning.pytorch import Callback, LightningModule, Trainer


class Companion(Callback):
    """A callback that acts on the network while it is being quantized, wherever in the Trainer's list it stands.

    :class:`ApplyPlan` and :class:`HAWQ` go to the front of the Trainer's callbacks in ``setup``, take every companion
    along, and call it around the moment at which they enable the quantizers.
    """

    def before_enable(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The network is float for the last time; not called where a checkpoint brought it quantized."""

    def after_enable(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Quantizers were enabled just now; not called where a checkpoint brought them so."""
