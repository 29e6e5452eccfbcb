"""Code formats: what the integer codes of a quantized tensor stand for, and what is stored beside them.

``affine``: ``(code - zero_point) * scale``, zero on the grid. ``midrise``: ``(code + 1/2) * scale``, levels at odd
halves. ``codebook``: bit k of the code is the sign of member k of a learned basis, one a channel. ``table``: the
code is the number of a level in a table of 2^b, one a layer. ``outliers30``: 30 of a thousand values, the largest, are
kept as float32 with their places, and the codes of the others are on an even grid.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from hawq_lightning._registry import Registry

FLOAT_BYTES = 4
_PLACE_BYTES, _COUNT_BYTES, _BLOCK = 2, 4, 1 << 16


@dataclass(frozen=True)
class CodeFormat:
    """A code format.

    Attributes:
        name: as in plans.
        storage_bytes: ``(channels, bits) -> bytes`` of the tensors that a weight of this format needs beside its codes.
        share: of the values that are kept at full precision beside the codes.
    """

    name: str
    storage_bytes: Callable[[int, int], int]
    share: float = 0.0

    def kept(self, elements: int) -> int:
        """How many of so many values are outliers at full precision."""
        return round(self.share * elements)

    def kept_bytes(self, elements: int) -> int:
        """What these take beside their codes: value, place in a block, and a count for each block."""
        blocks = -(-elements // _BLOCK) if self.share else 0
        return (FLOAT_BYTES + _PLACE_BYTES) * self.kept(elements) + _COUNT_BYTES * blocks


CODE_FORMATS: Registry[CodeFormat] = Registry("code format")


def scale_bytes(channels: int, bits: int) -> int:
    """One float32 scale a channel, whatever the bits."""
    return FLOAT_BYTES * channels


def code_bytes(elements: int, bits: int, code: str) -> float:
    """Bytes of the codes, without padding, and of the values that the format keeps at full precision.

    Args:
        elements: of the tensor.
        bits: of a code; 32: it stays float.
        code: code format.
    """
    return elements * bits / 8 + (CODE_FORMATS[code].kept_bytes(elements) if bits <= 8 else 0)


def register_code_format(
    name: str, storage_bytes: Callable[[int, int], int] = scale_bytes, share: float = 0.0
) -> CodeFormat:
    """Make a code format known, so that plans may hold it and sizes of files with it are predicted.

    Args:
        name: lower-case letters, digits and underscores.
        storage_bytes: ``(channels, bits) -> bytes`` of the tensors in ``Quantizer.storage()`` of such a weight.
        share: of the values that are kept at full precision beside the codes; their bytes come on top.

    Raises:
        HawqError: a malformed name, or another code format has it.
    """
    return CODE_FORMATS.add(name, CodeFormat(name, storage_bytes, share))


def _basis_bytes(channels: int, bits: int) -> int:
    return FLOAT_BYTES * channels * bits


def _table_bytes(channels: int, bits: int) -> int:
    return FLOAT_BYTES << bits


register_code_format("affine")
register_code_format("midrise")
register_code_format("codebook", _basis_bytes)
register_code_format("table", _table_bytes)
for _thousandths in (5, 10, 20, 30, 50):
    register_code_format(f"outliers{_thousandths}", share=_thousandths / 1000)
