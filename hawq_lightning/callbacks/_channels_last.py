"""Convolutions in channels-last memory order, which CPUs with AVX-512 and GPUs with tensor cores prefer."""

from __future__ import annotations

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn

from hawq_lightning.callbacks._trainer import after_layers_exist, builds_later


class ChannelsLast(Callback):
    """Lays out the module's 4-D parameters channels last before fitting; values and names stay."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """At every stage."""
        if builds_later(pl_module):
            after_layers_exist(pl_module, lambda: lay_out(pl_module))
        lay_out(pl_module)


def lay_out(module: nn.Module) -> None:
    """Channels last, for parameters and buffers of four axes."""
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.ndim == 4:
            tensor.data = tensor.data.contiguous(memory_format=torch.channels_last)
