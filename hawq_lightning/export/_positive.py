"""Positive scales, for formats that have no others: the codes of a channel with a negative scale change sign."""

from __future__ import annotations

import numpy as np


def positive_scales(codes: np.ndarray, scale: np.ndarray, axis: int, bits: int) -> tuple[np.ndarray, np.ndarray, int]:
    """Turn negative scales, such as a folded BatchNorm with a negative gamma gives, into codes of the other sign.

    Two's complement reaches from ``-2^(bits-1)`` to ``2^(bits-1) - 1``: a code of ``-2^(bits-1)`` that changes its sign
    is clamped to one step less, an error of one scale.

    Args:
        codes: integers.
        scale: one a channel.
        axis: channel axis of the codes.
        bits: of two's complement.

    Returns:
        codes, scales, and how many codes were clamped.
    """
    shape = [-1 if i == axis else 1 for i in range(codes.ndim)]
    signs = np.where(scale < 0, -1, 1).reshape(shape)
    turned = codes.astype(np.int32) * signs
    top = (1 << (bits - 1)) - 1
    clamped = int((turned > top).sum())
    return np.minimum(turned, top).astype(codes.dtype), np.abs(scale), clamped
