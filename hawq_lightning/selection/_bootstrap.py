"""Does the plan survive the noise of the traces? Bootstrap over images, select again, count."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from hawq_lightning._errors import HawqError
from hawq_lightning._plan import Plan
from hawq_lightning.selection._budget import UpperLimit, parse_budget
from hawq_lightning.selection._costs import cost_of
from hawq_lightning.selection._loss_budget import loss_budget
from hawq_lightning.selection._problem import Problem
from hawq_lightning.selection._request import Request
from hawq_lightning.selection._selectors import SELECTORS
from hawq_lightning.sensitivity import Sensitivity, SiteTrace


@dataclass(frozen=True)
class Stability:
    """How a plan fares when the images are drawn again.

    Attributes:
        share: site name -> share of bootstraps that give it the same bits.
        regret: the plan's score (Ω) above the bootstrap's best, relative, one a bootstrap.
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
    gets a normal error of its ``stderr_data``, cut at 0; a single row, whose is infinite, of the probes alone.

    Args:
        problem: with its sensitivity.
        seed: of the draws.
        bootstraps: how many.
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
        draws = {n: rng.integers(0, n, n) for n in counts}
        noise = rng.standard_normal(len(records))
        factors = {}
        for r, error in zip(records, noise):
            if r.name in tables:
                values, weights = tables[r.name]
                at = draws[len(values)]
                full, again = values.sum() / weights.sum(), values[at].sum() / weights[at].sum()
                factors[r.name] = max(float(again / full), 0.0) if full > 0 else 1.0
            elif r.trace > 0:
                factors[r.name] = max(1 + float(error) * _error(r) / r.trace, 0.0)
        out.append(factors)
    return out


def _error(record: SiteTrace) -> float:
    """The standard error to draw with: of a single row nobody knows what other images would have given."""
    error = record.stderr_data if math.isfinite(record.stderr_data) else record.stderr
    return error if math.isfinite(error) else 0.0


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


def bootstrap_stability(
    problem: Problem,
    plan: Plan,
    *,
    bootstraps: int = 100,
    seed: int = 0,
    eigenvalues: Mapping[str, float] | None = None,
) -> Stability:
    """Select again under redrawn traces and count how often every site keeps its bits.

    Args:
        problem: that the plan came from, with its sensitivity.
        plan: with the budget and the selector to repeat.
        bootstraps: how many.
        seed: of the draws.
        eigenvalues: site name -> top Hessian eigenvalue, for selectors that need them.

    Raises:
        HawqError: no sensitivity, no budget, or a selector that is not repeated under noise.
    """
    selector = SELECTORS[plan.selector]
    if "bootstrap" not in selector.offers:
        able = " and ".join(n for n in SELECTORS if "bootstrap" in SELECTORS[n].offers)
        raise HawqError(f"The selector {plan.selector!r} is not repeated under noise; stability is for {able}.")
    limits = parse_budget(plan.budget, problem)
    chosen = problem.choice_of(plan.bits)
    if loss_budget(plan.budget) is not None:  # met by the plan's size: what would others of that size be?
        limits = (*limits, UpperLimit("weight_bytes", cost_of(problem, "weight_bytes", chosen), "its size"))
    same = np.zeros(len(problem.groups))
    regret = []
    for factors in bootstrap_factors(problem, seed, bootstraps):
        redrawn = problem.redrawn(factors)
        again = selector.choose(Request(redrawn, limits, eigenvalues=eigenvalues))
        same += np.asarray(again) == np.asarray(chosen)
        best, score = redrawn.score_of(again), redrawn.score_of(chosen)
        regret.append(max(score / best - 1, 0.0) if best > 0 else (0.0 if score <= 0 else math.inf))
    share = {s.name: float(same[problem.group_of[i]] / bootstraps) for i, s in enumerate(problem.sites)}
    return Stability(share, tuple(regret), bootstraps)


def with_bootstrap_stability(problem: Problem, plan: Plan, *, bootstraps: int = 100, seed: int = 0) -> Plan:
    """The plan with :attr:`PlanSite.stability` filled in, and the regret in its settings.

    Args:
        problem: that the plan came from, with its sensitivity.
        plan: with the budget and the selector to repeat.
        bootstraps: how many.
        seed: of the draws.
    """
    stability = bootstrap_stability(problem, plan, bootstraps=bootstraps, seed=seed)
    sites = tuple(replace(s, stability=stability.share[s.name]) for s in plan.sites)
    settings = dict(plan.settings) | {"bootstraps": bootstraps, "bootstrap_regret95": stability.regret95}
    return plan.replace(sites=sites, settings=settings)
