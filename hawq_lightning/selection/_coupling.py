"""Weights and activations that a cost or a device couples become one block each, so that the sweep stays exact."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np

from hawq_lightning._errors import HawqError
from hawq_lightning.selection._linear_cost import LinearCost
from hawq_lightning.selection._pareto import Block, Floats, connected_groups
from hawq_lightning.selection._problem import Problem
from hawq_lightning.selection._sweep import Frontier, sweep

MAX_COMBINATIONS = 4096  # of activation bits inside one coupled part


def group_frontier(
    problem: Problem,
    row: LinearCost,
    scores: Sequence[Floats] | None = None,
    *,
    cap: float = math.inf,
    last: bool = False,
) -> Frontier:
    """The frontier of Ω (or other scores) and one linear cost; its "sites" are the problem's groups.

    Raises:
        HawqError: a part of the network couples too many activation sites for an exact frontier.
    """
    omega = list(scores if scores is not None else problem.scores())
    couples = {*row.pairs, *problem.allowed_pairs}
    parts = connected_groups(len(problem.groups), [list(c) for c in couples])
    blocks = [_block(problem, part, row, omega) for part in parts]
    for part, block in zip(parts, blocks):
        if not np.isfinite(block.cost + block.omega).any():
            names = ", ".join(problem.sites[problem.groups[g].members[0]].name for g in part[:4])
            raise HawqError(
                f"No choice of bits is available for {names}: the device or the cost table rules all of them out."
            )
    return sweep(blocks, len(problem.groups), start=row.constant, cap=cap, last=last, max_points=problem.max_points)


def can_sweep(problem: Problem, row: LinearCost) -> bool:
    """Whether the exact frontier needs few enough combinations."""
    parts = connected_groups(len(problem.groups), [list(c) for c in {*row.pairs, *problem.allowed_pairs}])
    return all(_combinations(problem, part) <= MAX_COMBINATIONS for part in parts)


def _combinations(problem: Problem, part: Sequence[int]) -> int:
    return math.prod(
        len(problem.groups[g].bits) for g in part if problem.groups[g].kind == "activation" and len(part) > 1
    )


def _block(problem: Problem, part: list[int], row: LinearCost, omega: Sequence[Floats]) -> Block:
    if len(part) == 1:
        g = part[0]
        return Block((g,), np.arange(len(omega[g]))[:, None], row.unary[g], omega[g])
    if _combinations(problem, part) > MAX_COMBINATIONS:
        raise HawqError(
            f"{len(part)} coupled groups make an exact frontier too large; select() solves single budgets "
            "exactly, or fix or tie activation bits."
        )
    inside = set(part)
    acts = [g for g in part if problem.groups[g].kind == "activation"]
    weights = [g for g in part if problem.groups[g].kind == "weight"]
    joint: list[Block] = []
    # given the activations' bits the weights are independent: one small frontier for each combination
    for bits in itertools.product(*(range(len(problem.groups[a].bits)) for a in acts)):
        at = dict(zip(acts, bits))
        start = math.fsum(float(row.unary[a][k]) for a, k in at.items())
        start += math.fsum(float(t[at[i], at[a]]) for (i, a), t in row.pairs.items() if i in at and a in inside)
        shift = math.fsum(float(omega[a][k]) for a, k in at.items())
        blocks = []
        for w in weights:
            cost, score = row.unary[w].copy(), np.array(omega[w], dtype=np.float64)
            for (i, a), table in row.pairs.items():
                if i == w and a in inside:
                    cost += table[:, at[a]]
            for (i, a), allowed in problem.allowed_pairs.items():
                if i == w and a in inside:
                    score[~allowed[:, at[a]]] = math.inf
            blocks.append(Block((w,), np.arange(len(cost))[:, None], cost, score))
        if not math.isfinite(start + shift) or not all(np.isfinite(b.cost + b.omega).any() for b in blocks):
            continue
        if not weights:  # factors of attention, which only other activations are multiplied with
            joint.append(Block(tuple(part), np.array([bits]), np.array([start]), np.array([shift])))
            continue
        front = sweep(blocks, len(problem.groups), start=start, max_points=problem.max_points)
        if front.factor > 1:
            raise HawqError(
                f"The frontier of {len(part)} coupled groups exceeds {problem.max_points} points; use fewer widths."
            )
        rows = front.table()[:, part]
        rows[:, [part.index(a) for a in acts]] = bits
        joint.append(Block(tuple(part), rows, front.cost, front.omega + shift))
    if not joint:
        return Block(tuple(part), np.zeros((1, len(part)), dtype=np.int64), np.array([math.inf]), np.array([math.inf]))
    return Block(
        tuple(part),
        np.concatenate([b.rows for b in joint]),
        np.concatenate([b.cost for b in joint]),
        np.concatenate([b.omega for b in joint]),
    ).pruned()
