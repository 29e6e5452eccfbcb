"""Gradients as codes of 1, 2, 4 or 8 bits with a scale for every block, packed into bytes on any device."""

from __future__ import annotations

import torch

WIDTHS = (1, 2, 4, 8)  # of which a whole number fills a byte
BLOCK = 256  # values that share a scale
_FLOAT_BYTES = 4


def message_bytes(elements: int, bits: int) -> int:
    """Bytes of so many values: scales, and codes padded to whole bytes; 32: the values themselves."""
    if bits == 8 * _FLOAT_BYTES:
        return _FLOAT_BYTES * elements
    return _FLOAT_BYTES * -(-elements // BLOCK) + -(-elements * bits // 8)


def encode(values: torch.Tensor, bits: int) -> torch.Tensor:
    """A message, uint8.

    Levels lie at odd halves of a step, symmetric about zero: up to the block's largest magnitude, or for one bit at its
    mean magnitude.

    Args:
        values: float32, flat.
        bits: 1, 2, 4 or 8; 32: as they are.
    """
    if bits == 8 * _FLOAT_BYTES:
        return values.contiguous().view(torch.uint8)
    half, rows = 1 << (bits - 1), _blocks(values)
    step = _steps(values, bits)
    codes = torch.floor(rows / step[:, None].clamp_min(1e-38)).clamp_(-half, half - 1).add_(half)
    flat = codes.reshape(-1)[: len(values)].to(torch.uint8)
    each = 8 // bits
    padded = torch.cat([flat, flat.new_zeros(-len(flat) % each)]).reshape(-1, each)
    shifts = torch.arange(each, device=values.device, dtype=torch.uint8) * bits
    return torch.cat([step.view(torch.uint8), (padded << shifts).sum(1, dtype=torch.uint8)])


def decode(message: torch.Tensor, elements: int, bits: int) -> torch.Tensor:
    """The values that a message stands for, float32 ``[elements]``.

    Args:
        message: of :func:`encode`.
        elements: number of values.
        bits: that they were encoded with.
    """
    if bits == 8 * _FLOAT_BYTES:
        return message.clone().view(torch.float32)
    half, blocks, each = 1 << (bits - 1), -(-elements // BLOCK), 8 // bits
    step = message[: _FLOAT_BYTES * blocks].clone().view(torch.float32)
    shifts = torch.arange(each, device=message.device, dtype=torch.uint8) * bits
    codes = (message[_FLOAT_BYTES * blocks :, None] >> shifts) & ((1 << bits) - 1)
    levels = codes.reshape(-1)[:elements].float() - half + 0.5
    return levels * step.repeat_interleave(BLOCK)[:elements]


def rounded(values: torch.Tensor, bits: int) -> torch.Tensor:
    """What a receiver gets."""
    return decode(encode(values, bits), len(values), bits)


def _blocks(values: torch.Tensor) -> torch.Tensor:
    return torch.cat([values, values.new_zeros(-len(values) % BLOCK)]).reshape(-1, BLOCK)


def _steps(values: torch.Tensor, bits: int) -> torch.Tensor:
    rows = _blocks(values).abs()
    if bits == 1:
        counts = torch.full((len(rows),), float(BLOCK), dtype=torch.float32, device=values.device)
        if len(rows):
            counts[-1] = len(values) - BLOCK * (len(rows) - 1)
        return 2 * rows.sum(1) / counts
    return rows.amax(1) * 2 / ((1 << bits) - 1)
