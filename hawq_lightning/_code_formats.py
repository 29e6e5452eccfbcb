"""Code formats: what the integer codes of a quantized tensor stand for, and what is stored beside them.

``affine``: ``(code - zero_point) * scale``, zero on the grid. ``midrise``: ``(code + 1/2) * scale``, levels at odd
halves. ``codebook``: the code is the number of a level in a learned table.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from hawq_lightning._registry import Registry

FLOAT_BYTES = 4


@dataclass(frozen=True)
class CodeFormat:
    """A code format.

    Attributes:
        name: as in plans.
        storage_bytes: ``(channels, bits) -> bytes`` of the tensors that a weight of this format needs beside its codes.
    """

    name: str
    storage_bytes: Callable[[int, int], int]


CODE_FORMATS: Registry[CodeFormat] = Registry("code format")


def scale_bytes(channels: int, bits: int) -> int:
    """One float32 scale a channel, whatever the bits."""
    return FLOAT_BYTES * channels


def register_code_format(name: str, storage_bytes: Callable[[int, int], int] = scale_bytes) -> CodeFormat:
    """Make a code format known, so that plans may hold it and sizes of files with it are predicted.

    Args:
        name: lower-case letters, digits and underscores.
        storage_bytes: ``(channels, bits) -> bytes`` of the tensors in ``Quantizer.storage()`` of such a weight.

    Raises:
        HawqError: a malformed name, or another code format has it.
    """
    return CODE_FORMATS.add(name, CodeFormat(name, storage_bytes))


def _basis_bytes(channels: int, bits: int) -> int:
    return FLOAT_BYTES * channels * bits


def _table_bytes(channels: int, bits: int) -> int:
    return FLOAT_BYTES << bits


register_code_format("affine")
register_code_format("midrise")
register_code_format("codebook", _basis_bytes)
register_code_format("table", _table_bytes)
