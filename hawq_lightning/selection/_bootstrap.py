"""Does the plan survive the noise of the traces? Bootstrap over images, select again, count."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from hawq_lightning._errors import HawqError
from hawq_lightning._plan import Plan
from hawq_lightning.selection._budget import parse_budget
from hawq_lightning.selection._problem import Problem
from hawq_lightning.selection._request import Request
from hawq_lightning.selection._selectors import SELECTORS
from hawq_lightning.sensitivity import Sensitivity


@dataclass(frozen=True)
class Stability:
    """How a plan fares when the images are drawn again.

    Attributes:
        share: site name -> share of bootstraps that give it the same bits.
        regret: the plan's Ω above the bootstrap's best, relative, one a bootstrap.
        bootstraps: how many.
    """

    share: dict[str, float]
    regret: tuple[float, ...]
    bootstraps: int

    @property
    def regret95(self) -> float:
        """95% of the bootstraps lose less than this share of Ω by keeping the plan."""
        return float(np.quantile(self.regret, 0.95))


def bootstrap_factors(problem: Problem, seed: int = 0, bootstraps: int = 100) -> list[dict[str, float]]:
    """Site name -> drawn mean trace over measured mean trace, for every bootstrap.

    Sites measured on the same rows are redrawn together, so what they share cancels in the ranking. A site without rows
    gets a normal error of its ``stderr_data``, cut at 0.
    """
    measured = problem.sensitivity
    if measured is None:
        raise HawqError("Bootstrapping a plan needs the sensitivity that it came from.")
    rng = np.random.default_rng(seed)
    names = {s.name for s in problem.sites}
    records = [r for r in measured if r.name in names]
    tables = {r.name: _weighted(measured, r.name) for r in records if len(measured.rows.get(r.name, ())) > 1}
    counts = sorted({len(values) for values, _ in tables.values()})
    out = []
    for _ in range(bootstraps):
        drawn = {n: rng.integers(0, n, n) for n in counts}
        noise = rng.standard_normal(len(records))
        factors = {}
        for r, error in zip(records, noise):
            if r.name in tables:
                values, weights = tables[r.name]
                at = drawn[len(values)]
                full, again = values.sum() / weights.sum(), values[at].sum() / weights[at].sum()
                factors[r.name] = max(float(again / full), 0.0) if full > 0 else 1.0
            elif r.trace > 0:
                factors[r.name] = max(1 + float(error) * r.stderr_data / r.trace, 0.0)
        out.append(factors)
    return out


def _weighted(measured: Sensitivity, name: str) -> tuple[np.ndarray, np.ndarray]:
    """(weight · mean trace of a row, weight of a row)."""
    values = np.asarray(measured.rows[name], dtype=np.float64)
    sizes = np.asarray(measured.sizes.get(name, ()), dtype=np.float64)
    if len(sizes) == len(values):
        values = values / sizes
    weights = np.asarray(measured.row_weights.get(name, ()), dtype=np.float64)
    if len(weights) != len(values):
        weights = np.ones(len(values))
    return values * weights, weights


def stability(problem: Problem, plan: Plan, *, bootstraps: int = 100, seed: int = 0, **given: Any) -> Stability:
    """Select again under redrawn traces and count how often every site keeps its bits.

    Args:
        problem: that the plan came from, with its sensitivity.
        plan: with the budget and the selector to repeat.
        bootstraps: how many.
        seed: of the draws.
        given: what the selector needs (``eigenvalues``).

    Raises:
        HawqError: no sensitivity, no budget, or a selector that does not look at traces.
    """
    if plan.selector not in ("pareto", "monotone"):
        raise HawqError(
            f"The selector {plan.selector!r} is not repeated under noise; stability is for pareto and monotone."
        )
    bounds = parse_budget(plan.budget, problem)
    chosen = problem.choice_of(plan.bits)
    same = np.zeros(len(problem.groups))
    regret = []
    for factors in bootstrap_factors(problem, seed, bootstraps):
        other = problem.scaled(factors)
        if plan.selector == "monotone" and problem.sensitivity is not None:
            other.sensitivity = replace(
                problem.sensitivity,
                records=tuple(
                    replace(r, mean_trace=r.mean_trace * factors.get(r.name, 1.0)) for r in problem.sensitivity
                ),
            )
        again = SELECTORS[plan.selector](Request(other, bounds, **given))
        same += np.asarray(again) == np.asarray(chosen)
        best, have = other.omega_of(again), other.omega_of(chosen)
        regret.append(max(have / best - 1, 0.0) if best > 0 else (0.0 if have <= 0 else math.inf))
    share = {s.name: float(same[problem.group_of[i]] / bootstraps) for i, s in enumerate(problem.sites)}
    return Stability(share, tuple(regret), bootstraps)


def with_bootstrap_stability(problem: Problem, plan: Plan, *, bootstraps: int = 100, seed: int = 0) -> Plan:
    """The plan with :attr:`PlanSite.stability` filled in, and the regret in its settings."""
    found = stability(problem, plan, bootstraps=bootstraps, seed=seed)
    sites = tuple(replace(s, stability=found.share[s.name]) for s in plan.sites)
    settings = dict(plan.settings) | {"bootstraps": bootstraps, "bootstrap_regret95": found.regret95}
    return plan.replace(sites=sites, settings=settings)
