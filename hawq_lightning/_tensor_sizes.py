"""Bytes of tensors: as they are, and as float32, which compressions and shares are against."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

_FLOAT32 = 4


@dataclass(frozen=True)
class TensorSize:
    """What tensors take.

    Attributes:
        elements: that are stored; of a sparse tensor its values.
        bytes: at their own types, a sparse tensor's indices among them.
        float32_bytes: real floats counted at 4 bytes and complex ones at 8, others as they are.
    """

    elements: int = 0
    bytes: int = 0
    float32_bytes: int = 0

    def __add__(self, other: TensorSize) -> TensorSize:
        return TensorSize(
            self.elements + other.elements, self.bytes + other.bytes, self.float32_bytes + other.float32_bytes
        )


def size_of(tensors: Iterable[torch.Tensor]) -> TensorSize:
    """The size of tensors together; parameters without a shape yet count nothing."""
    return sum((_size(t) for t in tensors if not torch.nn.parameter.is_lazy(t)), TensorSize())


def _size(tensor: torch.Tensor) -> TensorSize:
    values, indices = tensor, list[torch.Tensor]()
    if tensor.layout == torch.sparse_coo:
        tensor = tensor.detach().coalesce()
        values, indices = tensor.values(), [tensor.indices()]
    elif tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        values, indices = tensor.values(), [tensor.crow_indices(), tensor.col_indices()]
    elif tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        values, indices = tensor.values(), [tensor.ccol_indices(), tensor.row_indices()]
    own, beside = _bytes(values), sum(map(_bytes, indices))
    whole = values.numel() * _FLOAT32 * (2 if values.is_complex() else 1)
    is_float = values.is_floating_point() or values.is_complex()
    return TensorSize(values.numel(), own + beside, (whole if is_float else own) + beside)


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()
