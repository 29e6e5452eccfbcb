"""A tensor that something of the network reads, in one pass."""

from __future__ import annotations

from dataclasses import dataclass

import torch

Key = tuple[int, int, int]  # pass, id and version of a tensor


def version_of(x: torch.Tensor) -> int:
    """How often a tensor was changed in place; tensors made in inference mode do not count."""
    return 0 if x.is_inference() else x._version


@dataclass(frozen=True)
class Read:
    """A tensor that a layer of the network reads, or a product of attention.

    Attributes:
        layer: its name, or that of the operand.
        key: of the tensor.
        shape: of the tensor.
        images: of the pass.
    """

    layer: str
    key: Key
    shape: tuple[int, ...]
    images: int

    @property
    def numel(self) -> int:
        """Elements, of all images."""
        return torch.Size(self.shape).numel()
