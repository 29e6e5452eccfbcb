"""Quantizers that a module holds beside what it was written with."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from hawq_lightning._types import Options


class HeldQuantizers(nn.ModuleDict):
    """Quantizers by name, as one child of a module.

    Attributes:
        quantizer_name: registered.
        quantizer_options: keywords that they were made with.
    """

    def __init__(self, quantizers: Mapping[str, nn.Module], name: str, options: Options) -> None:
        super().__init__(quantizers)
        self.quantizer_name, self.quantizer_options = name, dict(options)


class AttentionQuantizers(HeldQuantizers):
    """Quantizers of what a module's attention reads, by operand."""


class ResultQuantizers(HeldQuantizers):
    """Quantizers of results of functions in a module's forward, by their names there."""

    def forward(self, x: object) -> object:
        """Changes nothing: a ``Sequential`` calls all that it holds."""
        return x
