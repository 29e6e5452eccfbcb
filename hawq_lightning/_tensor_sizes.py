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


def sparse_parts(tensor: torch.Tensor) -> list[torch.Tensor]:
    """Indices of a sparse tensor, and last its values; nothing of a tensor of another layout."""
    if tensor.layout == torch.sparse_coo:
        merged = tensor.detach().coalesce()
        return [merged.indices(), merged.values()]
    names = _COMPRESSED.get(tensor.layout)
    return [] if names is None else [*(getattr(tensor, name)() for name in names), tensor.values()]


_COMPRESSED = {
    torch.sparse_csr: ("crow_indices", "col_indices"),
    torch.sparse_bsr: ("crow_indices", "col_indices"),
    torch.sparse_csc: ("ccol_indices", "row_indices"),
    torch.sparse_bsc: ("ccol_indices", "row_indices"),
}


def _size(tensor: torch.Tensor) -> TensorSize:
    *indices, values = sparse_parts(tensor) or [tensor]
    own, beside = _bytes(values), sum(map(_bytes, indices))
    whole = values.numel() * _FLOAT32 * (2 if values.is_complex() else 1)
    is_float = values.is_floating_point() or values.is_complex()
    return TensorSize(values.numel(), own + beside, (whole if is_float else own) + beside)


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()
