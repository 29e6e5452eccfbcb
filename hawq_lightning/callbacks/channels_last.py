"""Convolutions in channels-last memory order, which CPUs with AVX-512 and GPUs with tensor cores prefer."""

from __future__ import annotations

import torch
from lightning.pytorch import Callback, LightningModule, Trainer


class ChannelsLast(Callback):
    """Lays out the module's 4-D parameters channels last before fitting; values and names stay."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """At every stage."""
        pl_module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
