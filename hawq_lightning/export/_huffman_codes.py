"""Canonical Huffman codes of small symbols: what they will take, the stream, and the symbols again."""

from __future__ import annotations

from itertools import islice

import numpy as np
import torch

from hawq_lightning._errors import HawqError
from hawq_lightning._extra import require


def code_lengths(symbols: torch.Tensor, alphabet: int) -> torch.Tensor:
    """Bits of every symbol's code, uint8 ``[alphabet]``; 0: the symbol does not occur.

    Args:
        symbols: integers from 0 to ``alphabet - 1``, any shape.
        alphabet: number of symbols.
    """
    counts = torch.bincount(symbols.reshape(-1).long(), minlength=alphabet)
    frequent = {k: int(n) for k, n in enumerate(counts.tolist()) if n}
    lengths = torch.zeros(alphabet, dtype=torch.uint8)
    if frequent:
        codes, _, _ = require("bitarray.util").canonical_huffman(frequent)
        for symbol, code in codes.items():
            lengths[symbol] = len(code)
    return lengths


def stream_bytes(symbols: torch.Tensor, lengths: torch.Tensor) -> int:
    """Bytes of the stream, before it is made; the last one is filled up with zeros."""
    counts = torch.bincount(symbols.reshape(-1).long(), minlength=len(lengths))
    return (int((counts * lengths.long()).sum()) + 7) // 8


def encode(symbols: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """The stream, uint8: one code after the other, in row-major order.

    Args:
        symbols: integers that have a code.
        lengths: of :func:`code_lengths`.
    """
    bits = require("bitarray").bitarray(endian="little")
    codes = _codes(lengths)
    if codes:
        bits.encode(codes, symbols.reshape(-1).tolist())
    return torch.from_numpy(np.frombuffer(bytes(bits.tobytes()), np.uint8).copy())


def decode(stream: torch.Tensor, lengths: torch.Tensor, count: int) -> torch.Tensor:
    """Undo :func:`encode`.

    Args:
        stream: uint8.
        lengths: of :func:`code_lengths`.
        count: number of symbols.

    Returns:
        int32 ``[count]``.

    Raises:
        HawqError: lengths that no code has, or a stream that ends too early or too late.
    """
    if not count:
        return torch.zeros(0, dtype=torch.int32)
    per_length, symbols = _canonical(lengths)
    bits = require("bitarray").bitarray(endian="little")
    bits.frombytes(stream.numpy().tobytes())
    try:
        read = list(islice(require("bitarray.util").canonical_decode(bits, per_length, symbols), count))
    except ValueError as error:
        raise HawqError(f"its Huffman codes are damaged ({error})") from error
    out = torch.tensor(read, dtype=torch.int32)
    if len(read) != count or stream_bytes(out, lengths) != len(stream):
        raise HawqError(f"its Huffman codes are of another number of symbols than {count}")
    return out


def _canonical(lengths: torch.Tensor) -> tuple[list[int], list[int]]:
    """How many codes there are of every length, and the symbols in the order of their codes."""
    listed = lengths.tolist()
    symbols = sorted((k for k, length in enumerate(listed) if length), key=lambda k: (listed[k], k))
    per_length = [0] * (max(listed, default=0) + 1)
    for k in symbols:
        per_length[listed[k]] += 1
    if not symbols or sum(n / 2**length for length, n in enumerate(per_length)) > 1:
        raise HawqError("the lengths of its Huffman codes are those of no code")
    return per_length, symbols


def _codes(lengths: torch.Tensor) -> dict[int, object]:
    """Symbol -> code: numbers in ascending order, moved to the next length where one begins."""
    make = require("bitarray").frozenbitarray
    if not bool(lengths.any()):
        return {}
    _, symbols = _canonical(lengths)
    codes, number, before = {}, 0, int(lengths[symbols[0]])
    for k in symbols:
        number <<= int(lengths[k]) - before
        before = int(lengths[k])
        codes[k] = make(f"{number:0{before}b}")
        number += 1
    return codes
