"""The numbers behind the paper's Fig. 4: the frontier, set B and its own, uniform and hand-made plans."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from hawq_lightning._csv import csv_text
from hawq_lightning._errors import HawqError
from hawq_lightning._io import write_text
from hawq_lightning._plan import Plan
from hawq_lightning.selection._costs import cost_of, cost_rows
from hawq_lightning.selection._monotone import monotone_frontier, trace_order
from hawq_lightning.selection._plan_frontier import plan_frontier
from hawq_lightning.selection._problem import Problem
from hawq_lightning.selection._selectors import uniform_choice


def tradeoff(
    problem: Problem,
    cost: str = "weight_bytes",
    *,
    plans: Mapping[str, Plan] | None = None,
    points: int = 1000,
    samples: int = 1000,
    seed: int = 0,
) -> list[dict[str, str | float]]:
    """Points of the trade-off between a cost and Ω, one dict each: ``series``, ``label``, ``cost``, ``omega``.

    Args:
        problem: with its sensitivity where set B is wanted.
        cost: what the horizontal axis shows.
        plans: plans to mark, by label (the chosen one, hand-picked ones).
        points: of each frontier at most, ends kept.
        samples: random members of set B, each as likely as any other.
        seed: of the samples.

    Returns:
        Series ``frontier``, ``set B frontier`` and ``set B`` (both only with traces and without couplings),
        ``uniform``, ``plan``.
    """
    front = plan_frontier(problem, cost)
    out = [_point("frontier", "", front.cost[i], front.omega[i]) for i in _spread(len(front), points)]
    row = cost_rows(problem, cost)[0]
    if problem.sensitivity is not None and len(problem.sensitivity) and not row.pairs and not problem.allowed_pairs:
        chains = trace_order(problem)
        chain = next((c for c in chains if any(row.unary[g].any() for g in c)), [])
        inside = monotone_frontier(problem, row, chain)
        out += [_point("set B frontier", "", inside.cost[i], inside.omega[i]) for i in _spread(len(inside), points)]
        rest = inside.choice(0)
        for picks in sample_set_b([problem.groups[g].bits for g in chain], samples, seed):
            choice = list(rest)
            for g, k in zip(chain, picks):
                choice[g] = k
            out.append(_point("set B", "", row(choice), problem.score_of(choice)))
    for kind in ("weight", "activation"):
        widths = sorted({b for g in problem.groups if g.kind == kind for b in g.bits})
        moves = any(row.unary[j].any() for j, g in enumerate(problem.groups) if g.kind == kind)
        for b in widths if moves and len(widths) > 1 else ():
            choice_ = uniform_choice(problem, b, None) if kind == "weight" else _uniform_activations(problem, b)
            if choice_ is not None and problem.pairs_fit(choice_):
                out.append(_point("uniform", f"{b} bit {kind}s", row(choice_), problem.score_of(choice_)))
    for label, plan in (plans or {}).items():
        chosen = problem.choice_of(plan.bits)
        out.append(_point("plan", label, row(chosen), problem.score_of(chosen)))
    return out


def uniform_points(problem: Problem, cost: str = "weight_bytes") -> list[tuple[int, float, float]]:
    """``(bits, cost, score)`` of the plans with the same weight bits everywhere (fixed sites keep theirs).

    Args:
        problem: with its scores, Ω by default.
        cost: a registered cost.
    """
    widths = sorted({b for g in problem.groups if g.kind == "weight" for b in g.bits})
    choices = ((b, uniform_choice(problem, b, None)) for b in widths)
    return [(b, cost_of(problem, cost, c), problem.score_of(c)) for b, c in choices if c is not None]


def save_tradeoff(rows: Sequence[Mapping[str, object]], path: str | Path) -> None:
    """Write the rows of :func:`tradeoff` as CSV, atomically."""
    columns = ("series", "label", "cost", "omega")
    write_text(path, csv_text(columns, ([row.get(c) for c in columns] for row in rows), lineterminator="\r\n"))


def set_b_count(bits: Sequence[Sequence[int]]) -> int:
    """``|B|`` for groups with widths of their own, in ascending order of mean trace."""
    return sum(_completions(bits)[0]) if bits else 1


def sample_set_b(bits: Sequence[Sequence[int]], samples: int, seed: int = 0) -> list[list[int]]:
    """Members of B drawn uniformly: positions in every group's widths, groups ascending in mean trace.

    Raises:
        HawqError: no member exists.
    """
    if not bits:
        return []
    left = _completions(bits)
    if not sum(left[0]):
        raise HawqError("Set B is empty: the widths of these sites admit no order.")
    draw = random.Random(seed)
    out = []
    for _ in range(samples):
        last, picks = 0, []
        for widths, ways in zip(bits, left):
            weights = [w if b >= last else 0 for b, w in zip(widths, ways)]
            ticket = draw.randrange(sum(weights))  # exact, however many members there are
            k = 0
            while ticket >= weights[k]:
                ticket -= weights[k]
                k += 1
            picks.append(k)
            last = widths[k]
        out.append(picks)
    return out


def _completions(bits: Sequence[Sequence[int]]) -> list[list[int]]:
    """How many members of B go on from each width of each group."""
    out: list[list[int]] = [[1] * len(bits[-1])]
    for here, after in zip(reversed(bits[:-1]), reversed(bits[1:])):
        out.insert(0, [sum(n for b, n in zip(after, out[0]) if b >= a) for a in here])
    return out


def _uniform_activations(problem: Problem, bits: int) -> list[int] | None:
    out = []
    for group in problem.groups:
        if group.kind == "weight":
            out.append(int(np.argmin(group.score)))
        elif len(group.bits) > 1 and bits not in group.bits:
            return None
        else:
            out.append(group.bits.index(bits) if bits in group.bits else 0)
    return out


def _spread(count: int, most: int) -> list[int]:
    return sorted({int(i) for i in np.linspace(0, count - 1, min(count, most)).round()}) if count else []


def _point(series: str, label: str, cost: float, omega: float) -> dict[str, str | float]:
    return {"series": series, "label": label, "cost": float(cost), "omega": float(omega)}
