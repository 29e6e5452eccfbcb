"""Seconds for the whole exact frontier, and for one budget by our sweep, PuLP/CBC and HiGHS.

    python benchmarks/selection.py [--models 18,50,152] [--repeats 3]

Layer sizes are ResNet's on ImageNet; Ω is synthetic (lognormal traces, 4^-bits perturbation with 10% scatter), the same
for all three solvers. Each solver must reach the frontier's Ω at the budget (relative 1e-6), or the row says by how
much it missed. PuLP is optional: ``pip install pulp``.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array, kron

from hawq_lightning.selection import (
    Block,
    Problem,
    cost_rows,
    frontier,
    monotone_frontier,
    set_b_size,
    sweep,
    trace_order,
)

BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}
WIDTHS = {4: (1, 2, 4, 8), 8: (1, 2, 3, 4, 5, 6, 7, 8)}
BUDGET = 10.0  # times smaller than float32


def resnet_sizes(depth: int) -> np.ndarray:
    sizes, fan, deep = [64 * 3 * 49], 64, depth >= 50
    for width, count in zip((64, 128, 256, 512), BLOCKS[depth]):
        out = width * 4 if deep else width
        for block in range(count):
            sizes += [width * fan, width * width * 9, out * width] if deep else [width * fan * 9, out * width * 9]
            if block == 0 and fan != out:
                sizes.append(out * fan)
            fan = out
    return np.asarray([*sizes, 1000 * fan])


def synthetic(sizes: np.ndarray, bits: np.ndarray, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    trace = np.exp(rng.normal(0, 2, len(sizes)))[:, None]
    return trace * 4.0**-bits * np.exp(rng.normal(0, 0.1, (len(sizes), len(bits))))


def highs(omega: np.ndarray, cost: np.ndarray, limit: float) -> float:
    sites, widths = omega.shape
    scale = 1e3 / omega.max()
    one_hot = csr_array(kron(np.eye(sites), np.ones(widths)[None]))
    unit = 1e4 / limit
    answer = milp(
        omega.ravel() * scale,
        integrality=np.ones(omega.size),
        bounds=Bounds(0, 1),
        constraints=[
            LinearConstraint(one_hot, 1, 1),
            LinearConstraint(cost.ravel()[None] * unit, -np.inf, limit * unit),
        ],
        options={"mip_rel_gap": 0.0},
    )
    return float(answer.fun / scale)


def cbc(omega: np.ndarray, cost: np.ndarray, limit: float) -> float:
    import pulp

    problem = pulp.LpProblem("bits", pulp.LpMinimize)
    sites, widths = omega.shape
    x = [[pulp.LpVariable(f"x_{i}_{k}", cat="Binary") for k in range(widths)] for i in range(sites)]
    problem += pulp.lpSum(float(omega[i, k]) * x[i][k] for i in range(sites) for k in range(widths))
    for row in x:
        problem += pulp.lpSum(row) == 1
    problem += pulp.lpSum(int(cost[i, k]) * x[i][k] for i in range(sites) for k in range(widths)) <= limit
    problem.solve(pulp.PULP_CBC_CMD(msg=False, gapRel=0.0, timeLimit=120))
    return float(pulp.value(problem.objective))


def timed(run: Callable[[], float], repeats: int) -> tuple[float, float]:
    seconds, value = [], 0.0
    for _ in range(repeats):
        began = time.perf_counter()
        value = run()
        seconds.append(time.perf_counter() - began)
    return min(seconds), value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="18,34,50,101,152", help="ResNet depths")
    parser.add_argument("--repeats", type=int, default=3, help="the least of so many is shown")
    args = parser.parse_args()
    try:
        import pulp

        with_cbc = f"PuLP {pulp.__version__}"
    except ImportError:
        with_cbc = ""
    shown = with_cbc or "nothing (pip install pulp)"
    print(f"budget of the single solves: {BUDGET:g}x; seconds, least of {args.repeats}; CBC by {shown}")
    heads = "model, sites, widths, points, frontier, best by sweep, CBC solve, HiGHS solve, set B's frontier, size of B"
    print(f"| {heads.replace(', ', ' | ')} |")
    print("|---" * 10 + "|")
    for depth in map(int, args.models.split(",")):
        sizes = resnet_sizes(depth)
        for count, widths in WIDTHS.items():
            bits = np.asarray(widths)
            omega, cost = synthetic(sizes, bits, depth), sizes[:, None] * bits
            limit = float(np.floor(sizes.sum() * 32 / BUDGET))
            spent, found = timed(lambda o=omega, c=cost: frontier(o, c), args.repeats)
            assert found.factor == 1
            best = found.omega[found.best(limit)]
            blocks = [Block((i,), np.arange(count)[:, None], cost[i], omega[i]) for i in range(len(sizes))]
            single, value = timed(lambda b=blocks, c=limit: sweep(b, len(b), cap=c, last=True).omega[-1], args.repeats)
            assert abs(value / best - 1) < 1e-12
            cells = []
            for name, solver in (("cbc", cbc), ("highs", highs)):
                if name == "cbc" and not with_cbc:
                    cells.append("-")
                    continue
                seconds, value = timed(lambda s=solver, o=omega, c=cost, b=limit: s(o, c, b), args.repeats)
                off = value / best - 1
                cells.append(f"{seconds:.3f}" + (f" ({off:+.1e})" if abs(off) > 1e-6 else ""))
            names = [f"w{i}" for i in range(len(sizes))]
            numel = [int(n) for n in sizes]
            problem = Problem.from_arrays(names, widths, omega, numel, mean_trace=list(omega[:, 0]))
            row, order = cost_rows(problem, "weight_bytes")[0], trace_order(problem)[0]
            spent_b, _ = timed(lambda p=problem, r=row, q=order: monotone_frontier(p, r, q), 1)
            print(
                f"| ResNet{depth} | {len(sizes)} | {count} | {len(found):,} | {spent:.3f} | {single:.3f} "
                f"| {cells[0]} | {cells[1]} | {spent_b:.3f} | {set_b_size(len(sizes), count):.2e} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
