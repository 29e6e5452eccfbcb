"""From a choice to a Plan with its costs, and the frontier whose points are plans."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hawq_lightning._errors import HawqError
from hawq_lightning._io import write_text
from hawq_lightning._plan import Candidate, Plan, PlanSite
from hawq_lightning._site_table import Site
from hawq_lightning.layers import channel_axis_of
from hawq_lightning.selection._costs import COSTS
from hawq_lightning.selection._coupling import group_frontier
from hawq_lightning.selection._frontier import Floats, Frontier, Ints
from hawq_lightning.selection._latency import LatencyTable
from hawq_lightning.selection._problem import Problem
from hawq_lightning.sensitivity import Sensitivity, SiteTrace

CSV_ROWS = 5000


def make_plan(
    problem: Problem,
    choice: Sequence[int],
    *,
    budget: Any = None,
    selector: str = "manual",
    settings: Mapping[str, Any] | None = None,
    codes: Mapping[str, str] | None = None,
) -> Plan:
    """The plan of a choice, with every option that was weighed and every cost that can be told.

    Args:
        problem: where the numbers come from.
        choice: position in ``bits`` for every group.
        budget: as the user gave it.
        selector: which rule chose.
        settings: added to those of the sensitivity.
        codes: site name -> code kind to prefer where a width has several.
    """
    traces = {r.name: r for r in problem.sensitivity or ()}
    sites = []
    for i, site in enumerate(problem.sites):
        group = problem.group_of[i]
        bits = problem.groups[group].bits[choice[group]]
        option = _option(problem, i, bits, (codes or {}).get(site.name))
        trace = traces.get(site.name)
        sites.append(
            PlanSite(
                name=site.name,
                kind=site.kind,
                layers=site.layers,
                shape=site.shape,
                numel=site.numel,
                bits=bits,
                code=option.code,
                scale=option.scale,
                zero_point=option.zero_point,
                trace=trace.trace if trace else None,
                stderr=trace.stderr if trace else None,
                stderr_data=trace.stderr_data if trace else None,
                mean_trace=trace.mean_trace if trace else None,
                omega=option.omega,
                perturbation=option.perturbation,
                options=problem.options[site.name],
            )
        )
    measured = problem.sensitivity
    return Plan(
        sites=tuple(sites),
        layers=problem.layers,
        costs=costs_of(problem, choice),
        budget=_plain(budget),
        selector=selector,
        settings=(dict(measured.settings) if measured else {}) | dict(settings or {}),
        fingerprint=measured.fingerprint if measured else "",
    )


def costs_of(problem: Problem, choice: Sequence[int]) -> dict[str, float]:
    """Every cost of a choice that the problem has the numbers for; bytes, BOPs, milliseconds, and ratios."""
    out = {name: problem.cost_of(name, choice) for name in (*available_costs(problem), *problem.extra_costs)}
    counts = {k: sum(s.numel for s in problem.sites if s.kind == k) for k in ("weight", "activation")}
    out |= {
        "float_weight_bytes": 4.0 * counts["weight"],
        "file_overhead": float(problem.file_overhead),
        "mean_weight_bits": 8 * out["weight_bytes"] / counts["weight"],
        "w_comp": 4.0 * counts["weight"] / out["weight_bytes"],
        "weight_scales": float(sum(s.channels for s in problem.sites if s.kind == "weight")),
    }
    if "act_bytes" in out:
        out |= {
            "act_bits": 8 * out["act_bytes"],
            "float_act_bytes": 4.0 * counts["activation"],
            "mean_act_bits": 8 * out["act_bytes"] / counts["activation"],
            "a_comp": 4.0 * counts["activation"] / out["act_bytes"],
        }
    if "bops" in out:
        macs = float(sum(x.macs for x in problem.layers))
        out |= {"macs": macs, "bops_8bit": 64 * macs, "bops_float": 1024 * macs}
    for kind in ("weight", "activation"):
        out[f"omega_{kind}s"] = math.fsum(float(g.omega[k]) for g, k in zip(problem.groups, choice) if g.kind == kind)
    return out


def available_costs(problem: Problem) -> list[str]:
    """The costs that the problem has the numbers for."""
    missing = set()
    if not any(s.kind == "activation" for s in problem.sites):
        missing.add("act_bytes")
    if not any(x.macs for x in problem.layers):
        missing.add("bops")
    if problem.latency is None:
        missing.add("latency_ms")
    if not problem.steps:
        missing.add("act_peak_bytes")
    return [c for c in COSTS if c not in missing]


class PlanFrontier(Frontier):
    """A frontier whose points are plans of a problem; ``options(i)`` indexes each site's measured options."""

    problem: Problem
    cost_name: str
    _groups: Frontier

    def bits(self, i: int) -> dict[str, int]:
        """Site name -> bits at point ``i``."""
        choice = self._groups.options(i)
        return {s.name: self._bits(choice, j) for j, s in enumerate(self.problem.sites)}

    def plan(self, i: int, **fields: Any) -> Plan:
        """Point ``i`` as a plan; ``fields`` are those of :func:`make_plan`."""
        return make_plan(self.problem, self._groups.options(i), **({"selector": "pareto"} | fields))

    def table(self, points: Any = None) -> Ints:
        """``[points, sites]`` option indices of the given points, of all by default."""
        choices = self._groups.table(points)
        out = np.empty((len(choices), len(self.problem.sites)), dtype=np.int64)
        for j in range(len(self.problem.sites)):
            group = self.problem.group_of[j]
            where = [self.problem.best[j][b][0] for b in self.problem.groups[group].bits]
            out[:, j] = np.asarray(where)[choices[:, group]]
        return out

    def rows(self, max_rows: int | None = CSV_ROWS) -> list[dict[str, float]]:
        """One dict a point: cost, Ω (total, weights, activations), mean bits, compressions, bits of every site.

        Args:
            max_rows: longer frontiers are thinned evenly, ends kept; None: all points.
        """
        count = len(self)
        at = np.arange(count)
        if max_rows is not None and count > max_rows:
            at = np.unique(np.linspace(0, count - 1, max_rows).round().astype(np.int64))
        choices, problem = self._groups.table(at), self.problem
        bits = np.stack([np.asarray(problem.groups[g].bits)[choices[:, g]] for g in problem.group_of], axis=1)
        omegas = {
            kind: sum(
                (g.omega[choices[:, j]] for j, g in enumerate(problem.groups) if g.kind == kind), np.zeros(len(at))
            )
            for kind in ("weight", "activation")
        }
        means = {}
        for kind in ("weight", "activation"):
            size = np.asarray([s.numel if s.kind == kind else 0 for s in problem.sites], dtype=np.float64)
            if size.any():
                means[kind] = bits @ size / size.sum()
        out = []
        for k, i in enumerate(at):
            row: dict[str, float] = {
                self.cost_name: float(self.cost[i]),
                "omega": float(self.omega[i]),
                "omega_weights": float(omegas["weight"][k]),
                "omega_activations": float(omegas["activation"][k]),
                "mean_weight_bits": float(means["weight"][k]),
                "w_comp": 32 / float(means["weight"][k]),
            }
            if "activation" in means:
                row["mean_act_bits"] = float(means["activation"][k])
                row["a_comp"] = 32 / float(means["activation"][k])
            row |= {s.name: int(b) for s, b in zip(problem.sites, bits[k])}
            out.append({"point": int(i)} | row)
        return out

    def to_csv(self, path: str | Path, max_rows: int | None = CSV_ROWS) -> None:
        """Write :meth:`rows`, atomically. The first columns are ``point`` and ``cost``."""
        rows = [{("cost" if k == self.cost_name else k): v for k, v in row.items()} for row in self.rows(max_rows)]
        text = io.StringIO()
        writer = csv.DictWriter(text, list(rows[0]))
        writer.writeheader()
        writer.writerows({k: f"{v:.10g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)
        write_text(path, text.getvalue())

    def _bits(self, choice: Sequence[int], site: int) -> int:
        group = self.problem.group_of[site]
        return self.problem.groups[group].bits[choice[group]]


def wrap(problem: Problem, groups: Frontier, cost: str) -> PlanFrontier:
    """A frontier over groups as one over plans."""
    out = PlanFrontier(groups.cost, groups.omega, groups.factor, (), (), len(problem.sites))
    out.__dict__.update(problem=problem, cost_name=cost, _groups=groups)  # frozen
    return out


def plan_frontier(problem: Problem, cost: str = "weight_bytes", scores: Sequence[Floats] | None = None) -> PlanFrontier:
    """Every plan that no other beats in Ω and ``cost``.

    Raises:
        HawqError: no such cost, one that is a maximum of several rows, or too much coupling.
    """
    rows = problem.cost(cost)
    if len(rows) != 1:
        raise HawqError(f"{cost} is a maximum over time steps and has no frontier by this sweep; use it as a budget.")
    return wrap(problem, group_frontier(problem, rows[0], scores), cost)


def problem_of(plan: Plan, latency: LatencyTable | str | Path | None = None) -> Problem:
    """The problem that a plan answers, from what the plan's file holds (constraints and time steps excepted).

    Raises:
        HawqError: a site of the plan lists no options, or lacks the bits that it is given.
    """
    types = {x.name: x.type for x in plan.layers}
    sites, options, traces = [], {}, []
    for s in plan.sites:
        axis = channel_axis_of(types.get(s.layers[0] if s.layers else "", ""))
        channels = s.shape[axis] if s.kind == "weight" and len(s.shape) > axis else 1
        sites.append(Site(s.name, s.kind, s.layers, s.shape, s.numel, channels))
        if s.options:
            options[s.name] = s.options
        else:
            options[s.name] = (Candidate(s.bits, s.code, s.omega or 0.0, s.perturbation or 0.0, s.scale, s.zero_point),)
        if s.trace is not None and s.mean_trace is not None:
            traces.append(
                SiteTrace(s.name, s.kind, s.trace, s.stderr or 0.0, s.stderr_data or 0.0, s.numel, s.mean_trace)
            )
    sensitivity = Sensitivity(tuple(traces), settings=dict(plan.settings), fingerprint=plan.fingerprint)
    overhead = int(plan.costs.get("file_overhead", 0))
    problem = Problem(sites, options, sensitivity, overhead, latency=latency, layers=plan.layers)
    scales = plan.costs.get("weight_scales")
    if scales is not None:  # sites made from arrays have none
        have = sum(s.channels for s in problem.sites if s.kind == "weight")
        problem.file_overhead += 4 * (int(scales) - have)
    return problem


def recost(plan: Plan) -> Plan:
    """Check a plan whose bits were edited by hand, and fill in code kinds, scales, Ω and costs from its own options.

    Raises:
        HawqError: bits that the plan's options do not offer; the message names the site and the nearest width.
    """
    problem = problem_of(plan)
    out = problem.recost(plan)
    changed = any(a.omega != b.omega or a.scale != b.scale for a, b in zip(plan.sites, out.sites))
    if not changed:
        return plan.replace(costs=dict(plan.costs) | dict(out.costs) | _overhead(plan))
    return out.replace(selector="manual", costs=dict(out.costs) | _overhead(plan), settings=dict(plan.settings))


def _overhead(plan: Plan) -> dict[str, float]:
    return {k: v for k, v in plan.costs.items() if k in ("file_overhead", "weight_scales")}


def _option(problem: Problem, site: int, bits: int, code: str | None) -> Candidate:
    options = problem.options[problem.sites[site].name]
    asked = [o for o in options if o.bits == bits and o.code == code and math.isfinite(o.omega)]
    return min(asked, key=lambda o: o.omega) if asked else options[problem.best[site][bits][0]]


def _plain(budget: Any) -> Any:
    return {str(k): v for k, v in budget.items()} if isinstance(budget, Mapping) else budget
