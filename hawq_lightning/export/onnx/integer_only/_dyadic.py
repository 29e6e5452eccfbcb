"""Dyadic numbers ``b / 2^c``: what a scale over a scale becomes where no number may be a float.

Jacob et al. 2018, "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference",
section 2.2, with the sums of Yao et al. 2021, "HAWQ-V3: Dyadic Neural Network Quantization": several integers, each
times a multiplier of its own, one shift for all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hawq_lightning._errors import HawqError

SUM_BITS = 62  # bits of the magnitude of a sum in INT64


@dataclass(frozen=True)
class Dyadic:
    """``(sum of multipliers[i] * x[i] + offset) >> shift``, all INT64; the offset holds the half that rounds.

    Attributes:
        multipliers: one array for each integer tensor, of a shape that broadcasts to it.
        offset: broadcasts to the result.
        shift: as the offset; 0 to 61.
    """

    multipliers: tuple[np.ndarray, ...]
    offset: np.ndarray
    shift: np.ndarray


def dyadic(
    ratios: Sequence[np.ndarray],
    zeros: Sequence[int],
    reach: Sequence[int],
    constant: np.ndarray,
    top: int,
    bits: int = 31,
) -> Dyadic:
    """Multipliers, offset and shift of ``sum of ratios[i] * (x[i] - zeros[i]) + constant``, rounded half up.

    Args:
        ratios: real numbers, of shapes that broadcast to the result.
        zeros: code of 0 of each tensor.
        reach: largest magnitude that ``x[i]`` and ``x[i] - zeros[i]`` can have.
        constant: real number to add, among them the code of 0 of the result.
        top: one more than the largest magnitude of a result that is not clipped.
        bits: of a multiplier's magnitude.

    Raises:
        HawqError: a ratio is so large that no shift is left.
    """
    ratios = [np.asarray(r, np.float64) for r in ratios]
    constant = np.asarray(constant, np.float64)
    largest = np.zeros((), np.float64)
    for ratio in ratios:
        largest = np.maximum(largest, np.abs(ratio))
    # the largest multiplier takes all its bits: 2^(bits-1) <= ratio * 2^shift < 2^bits
    shift = bits - np.frexp(np.where(largest > 0, largest, 1.0))[1].astype(np.int64)
    shift = np.where(np.rint(np.ldexp(largest, shift)) >= 2.0**bits, shift - 1, shift)
    shift = np.maximum(shift, 0)  # a ratio above 2^bits: whole steps of the result
    # and whatever is summed stays below 2^62
    worst = np.abs(constant) + float(top)
    for ratio, zero, far in zip(ratios, zeros, reach):
        worst = worst + np.abs(ratio) * (2.0 * far + abs(zero)) + 1
    shift = np.minimum(shift, SUM_BITS - np.frexp(worst)[1].astype(np.int64))
    if (shift < 0).any():
        raise HawqError("A grid is so fine beside the sums that it takes in that no dyadic number holds their ratio.")
    shift, _ = np.broadcast_arrays(shift, constant)
    multipliers = tuple(np.rint(np.ldexp(r, shift)).astype(np.int64) for r in ratios)
    half = np.where(shift > 0, np.int64(1) << np.maximum(shift - 1, 0), 0)
    offset = np.rint(np.ldexp(constant, shift)).astype(np.int64) + half
    for multiplier, zero in zip(multipliers, zeros):
        offset = offset - multiplier * zero
    return Dyadic(multipliers, np.asarray(offset, np.int64), np.asarray(shift, np.int64))
