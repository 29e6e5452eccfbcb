"""Levels that are sums of a learned basis, and the basis of least squared error for given codes (LQ-Nets)."""

from __future__ import annotations

import torch

AVERAGE = 0.1  # weight of the new basis: the paper's moving average keeps 0.9
_RIDGE = 1e-9


def bit_table(bits: int, off: float, device: torch.device) -> torch.Tensor:
    """What every code takes of every member of the basis, ``[bits, 2^bits]``: 1 where its bit is set, ``off`` else."""
    numbers = torch.arange(1 << bits, device=device)
    return torch.stack([((numbers >> k) & 1).float() * (1.0 - off) + off for k in range(bits)])


def basis_levels(basis: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Level of every code; always summed in the same order.

    Args:
        basis: ``[..., b or more]``.
        table: of :func:`bit_table`.
    """
    total = basis[..., :1] * table[0]
    for k in range(1, len(table)):
        total = total + basis[..., k : k + 1] * table[k]
    return total


def decision_thresholds(ascending: torch.Tensor) -> torch.Tensor:
    """Where the nearest level changes, along the last axis; halves are added, so that nothing overflows."""
    return ascending[..., :-1] / 2 + ascending[..., 1:] / 2


def step_to_least_squares(residual: torch.Tensor, codes: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """How a basis must change so that it has the least squared error for these codes (algorithm 1, second half).

    Args:
        residual: ``[rows, columns]``, values less their present levels.
        codes: ``[rows, columns]``, the code of each value.
        table: of :func:`bit_table`.

    Returns:
        ``[rows, b]``, float64; directions that no value shows stay as they are.
    """
    columns = max(1, residual.shape[1])
    empty = torch.zeros(len(residual), table.shape[1], dtype=torch.float64, device=residual.device)
    counts = empty.scatter_add(1, codes, torch.ones_like(residual, dtype=torch.float64))
    sums = empty.scatter_add(1, codes, residual.double())
    table = table.double()
    gram = torch.einsum("kn,cn,ln->ckl", table, counts, table) / columns
    gram = gram + _RIDGE * torch.eye(len(table), dtype=torch.float64, device=residual.device)
    solution: torch.Tensor = torch.linalg.solve(gram, (sums @ table.T / columns)[..., None])
    return solution[..., 0]
