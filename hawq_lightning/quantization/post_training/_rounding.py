"""Rounding a weight up or down so that its outputs, not its entries, change least."""

from __future__ import annotations

from collections.abc import Callable

import torch

_SWEEPS = 20
_BLOCK = 64


def learn_rounding(
    weight: torch.Tensor,
    step: torch.Tensor,
    low: float,
    high: float,
    zero: float,
    gram: torch.Tensor,
    mixed: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes, each the one below or the one above its weight, of least mean squared output error.

    The error of a row is the quadratic form of Nagel et al. (AdaRound, ICML 2020, section 3), with the quantized input
    in the place of the float one: ``E (v q - w x)^2``. Rows do not depend on each other. Their roundings are found by
    coordinate descent on the form itself, from two starts: the nearest codes, and codes fixed one after another with
    those to come still float; each flip lowers the error, and it ends where none does.

    Args:
        weight: ``[rows, columns]``.
        step: ``[rows]``.
        low: least code.
        high: greatest code.
        zero: what stands for 0.
        gram: ``E[q q^T]``, ``[columns, columns]``.
        mixed: ``E[x q^T]``, ``[columns, columns]``.

    Returns:
        codes ``[rows, columns]`` (float), and per row the error of the learned and of the nearest codes, up to one
        constant a row.
    """
    s = step[:, None]
    scaled = weight / s + zero
    below = scaled.floor().clamp(low, high)
    above = (below + 1).clamp(low, high)
    below = torch.where(scaled < low, below, torch.minimum(below, above))
    above = torch.where((scaled <= low) | (scaled >= high), below, above)
    nearest = scaled.round().clamp(low, high)
    target = weight @ mixed

    def error(codes: torch.Tensor) -> torch.Tensor:
        v = (codes - zero) * s
        return ((v @ gram - 2 * target) * v).sum(1)

    first = _descend(nearest, below, above, s, zero, gram, target)
    second = _descend(_one_by_one(weight, below, above, s, zero, gram, target), below, above, s, zero, gram, target)
    better = (error(second) < error(first))[:, None]
    best = torch.where(better, second, first)
    worse = (error(best) > error(nearest))[:, None]  # by rounding of the arithmetic only
    best = torch.where(worse, nearest, best)
    return best, error(best), error(nearest)


def _one_by_one(
    weight: torch.Tensor, below: torch.Tensor, above: torch.Tensor, s: torch.Tensor, zero: float, gram: torch.Tensor,
    target: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    slope = 2 * (weight @ gram - target)
    down, up = (below - zero) * s - weight, (above - zero) * s - weight

    def choose(j: int, at: torch.Tensor, curve: torch.Tensor) -> torch.Tensor:
        rise = up[:, j] * (at + curve * up[:, j]) < down[:, j] * (at + curve * down[:, j])
        return torch.where(rise, up[:, j], down[:, j])

    moves = _column_by_column(slope, gram, choose)
    return torch.where((moves - up).abs() < (moves - down).abs(), above, below)


def _descend(
    codes: torch.Tensor, below: torch.Tensor, above: torch.Tensor, s: torch.Tensor, zero: float, gram: torch.Tensor,
    target: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    slope = 2 * (((codes - zero) * s) @ gram - target)
    for _ in range(_SWEEPS):
        flip = (below + above - 2 * codes) * s

        def choose(j: int, at: torch.Tensor, curve: torch.Tensor, flip: torch.Tensor = flip) -> torch.Tensor:
            move = flip[:, j]
            return torch.where(move * (at + curve * move) < 0, move, torch.zeros_like(move))

        moves = _column_by_column(slope, gram, choose)
        if not bool(moves.any()):
            break
        codes = torch.where(moves != 0, below + above - codes, codes)
    return codes


def _column_by_column(
    slope: torch.Tensor, gram: torch.Tensor, choose: Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """Move one column after another; ``slope`` follows, in place, a block of columns at a time."""
    moves = torch.zeros_like(slope)
    for start in range(0, slope.shape[1], _BLOCK):
        block = slice(start, min(start + _BLOCK, slope.shape[1]))
        here = slope[:, block].clone()
        for j in range(block.start, block.stop):
            moves[:, j] = choose(j, here[:, j - start], gram[j, j])
            here += 2 * moves[:, j, None] * gram[j, block]
        slope += 2 * moves[:, block] @ gram[block]
    return moves
