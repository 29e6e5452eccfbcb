"""Bit packing: b bits a code, one after the other, least significant bit first (a little-endian bit stream)."""

from __future__ import annotations

import numpy as np
import torch

from hawq_lightning._errors import HawqError

_CHUNK = 1 << 20  # codes at a time; a multiple of 8, so that every chunk ends on a whole byte
_MOST = 1 << 40


def packed_bytes(count: int, bits: int) -> int:
    """Bytes that ``count`` codes of ``bits`` bits take, padded to a whole byte."""
    if not 1 <= bits <= 8:
        raise HawqError(f"Codes of {bits!r} bits cannot be packed; use 1 to 8.")
    if not 0 <= count < _MOST:
        raise HawqError(f"{count!r} is no number of codes that can be packed.")
    return (count * bits + 7) // 8


def pack(codes: torch.Tensor, bits: int) -> np.ndarray:
    """Pack signed codes.

    Args:
        codes: integers in [-2^(bits-1), 2^(bits-1) - 1], any shape; read in row-major order.
        bits: 1 to 8.

    Returns:
        ``packed_bytes(codes.numel(), bits)`` bytes.

    Raises:
        HawqError: a code is out of range, or ``bits`` is.
    """
    size = packed_bytes(codes.numel(), bits)
    flat = codes.detach().reshape(-1).to("cpu", torch.int32).numpy()
    half = 1 << (bits - 1)
    if flat.size and not (-half <= int(flat.min()) and int(flat.max()) < half):
        raise HawqError(f"Codes from {flat.min()} to {flat.max()} do not fit in {bits} bits.")
    out = np.empty(size, np.uint8)
    for start in range(0, flat.size, _CHUNK):
        part = (flat[start : start + _CHUNK] + half).astype(np.uint8)
        stream = np.unpackbits(part[:, None], axis=1, count=bits, bitorder="little")
        begin = start * bits // 8
        out[begin : begin + packed_bytes(part.size, bits)] = np.packbits(stream.reshape(-1), bitorder="little")
    return out


def unpack(data: np.ndarray, bits: int, count: int) -> torch.Tensor:
    """Undo :func:`pack`.

    Args:
        data: exactly the ``packed_bytes(count, bits)`` bytes, uint8.
        bits: 1 to 8.
        count: number of codes.

    Returns:
        int32 tensor of shape [count].

    Raises:
        HawqError: the number of bytes is another one, or the padding bits are not zero.
    """
    size = packed_bytes(count, bits)
    if data.dtype != np.uint8 or data.ndim != 1 or data.size != size:
        raise HawqError(f"{count} codes of {bits} bits take {size} bytes, not {data.size}.")
    if count * bits % 8 and data[-1] >> (count * bits % 8):
        raise HawqError("The padding behind the codes is not zero.")
    half = 1 << (bits - 1)
    out = np.empty(count, np.int32)
    for start in range(0, count, _CHUNK):
        number = min(_CHUNK, count - start)
        begin = start * bits // 8
        stream = np.unpackbits(data[begin : begin + packed_bytes(number, bits)], count=number * bits, bitorder="little")
        out[start : start + number] = np.packbits(stream.reshape(number, bits), axis=1, bitorder="little")[:, 0]
    return torch.from_numpy(out - half)
