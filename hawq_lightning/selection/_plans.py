"""From a choice to a Plan with its costs, and back from a plan to its problem."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from hawq_lightning._candidates import Candidates
from hawq_lightning._errors import HawqError
from hawq_lightning._plan import Candidate, Plan, PlanSite
from hawq_lightning._site_table import FloatTensor, Site, SiteTable
from hawq_lightning.layers import channel_axis_of
from hawq_lightning.selection._costs import costs_of
from hawq_lightning.selection._latency import LatencyTable
from hawq_lightning.selection._problem import Problem
from hawq_lightning.selection._scores import DEFAULT_SCORE
from hawq_lightning.sensitivity import Sensitivity, SiteTrace


def make_plan(
    problem: Problem,
    choice: Sequence[int],
    *,
    budget: object = None,
    selector: str = "manual",
    settings: Mapping[str, object] | None = None,
    codes: Mapping[str, str] | None = None,
) -> Plan:
    """The plan of a choice, with every candidate that was weighed and every cost that the problem has the numbers for.

    Its quantizer is the one that the candidates were weighed with, where they are :class:`Candidates`, which tell it.

    Args:
        problem: where the numbers come from.
        choice: position in ``bits`` for every group.
        budget: as the user gave it.
        selector: which rule chose.
        settings: added to those of the sensitivity.
        codes: site name -> code format to prefer where a width has several.
    """
    traces = {r.name: r for r in problem.sensitivity or ()}
    sites = []
    for i, site in enumerate(problem.sites):
        group = problem.group_of[i]
        bits = problem.groups[group].bits[choice[group]]
        chosen = _candidate(problem, i, bits, (codes or {}).get(site.name))
        trace = traces.get(site.name)
        sites.append(
            PlanSite(
                name=site.name,
                kind=site.kind,
                layers=site.layers,
                shape=site.shape,
                numel=site.numel,
                bits=bits,
                code=chosen.code,
                scale=chosen.scale,
                zero_point=chosen.zero_point,
                trace=trace.trace if trace else None,
                stderr=trace.stderr if trace else None,
                stderr_data=trace.stderr_data if trace else None,
                mean_trace=trace.mean_trace if trace else None,
                omega=chosen.omega,
                perturbation=chosen.perturbation,
                options=tuple(problem.candidates[site.name]),
            )
        )
    measured, weighed = problem.sensitivity, problem.candidates
    score = {} if problem.score == DEFAULT_SCORE else {"score": problem.score}
    plan = Plan(
        sites=tuple(sites),
        layers=problem.layers,
        products=problem.products,
        biases=problem.biases,
        costs=costs_of(problem, choice, budget),
        budget=_plain(budget),
        selector=selector,
        settings=(dict(measured.settings) if measured else {}) | score | dict(settings or {}),
        fingerprint=measured.fingerprint if measured else "",
    )
    if isinstance(weighed, Candidates):
        return plan.replace(quantizer=weighed.quantizer, quantizer_options=dict(weighed.quantizer_options))
    return plan


def problem_of(plan: Plan, latency: LatencyTable | str | Path | None = None) -> Problem:
    """The problem that a plan answers, from what the plan's file holds (constraints and time steps excepted).

    Raises:
        HawqError: a site of the plan lists no candidates, lacks the bits that it is given, or has a trace without
            standard errors.
    """
    types = {x.name: x.type for x in plan.layers}
    sites, candidates, traces = [], {}, []
    for s in plan.sites:
        axis = channel_axis_of(types.get(s.layers[0] if s.layers else "", ""))
        channels = s.shape[axis] if s.kind == "weight" and len(s.shape) > axis else 1
        sites.append(Site(s.name, s.kind, s.layers, s.shape, s.numel, channels))
        if s.options:
            candidates[s.name] = s.options
        else:
            candidates[s.name] = (
                Candidate(s.bits, s.code, s.omega or 0.0, s.perturbation or 0.0, s.scale, s.zero_point),
            )
        if s.trace is not None and s.mean_trace is not None:
            if s.stderr is None or s.stderr_data is None:
                lacks = "stderr" if s.stderr is None else "stderr_data"
                raise HawqError(
                    f"Site {s.name!r} of the plan has a trace without {lacks}; give it, or take its trace out."
                )
            traces.append(SiteTrace(s.name, s.kind, s.trace, s.stderr, s.stderr_data, s.numel, s.mean_trace))
    sensitivity = Sensitivity(tuple(traces), settings=dict(plan.settings), fingerprint=plan.fingerprint)
    overhead = int(plan.costs.get("file_overhead", 0))
    scales = plan.costs.get("weight_scales")
    if scales is not None:  # sites made from arrays have none
        overhead += 4 * (int(scales) - sum(s.channels for s in sites if s.kind == "weight"))
    score = str(plan.settings.get("score", DEFAULT_SCORE))
    table = SiteTable(tuple(sites), plan.layers, float_tensors=_rest(plan), products=plan.products, biases=plan.biases)
    weighed = Candidates.of(candidates, table, plan.quantizer, plan.quantizer_options)
    return Problem(table, weighed, sensitivity, overhead, latency=latency, score=score)


def recost(plan: Plan, problem: Problem | None = None) -> Plan:
    """Check a plan whose bits were edited by hand, and fill in code formats, grids, Ω and costs that follow from them.

    Args:
        plan: as edited.
        problem: whose constraints and numbers it must meet; default: what the plan itself holds, and then a plan whose
            bits were not edited keeps all but its costs.

    Raises:
        HawqError: bits that are not on offer; the message names the site and the nearest width.
    """
    whole = problem or problem_of(plan)
    recosted = make_plan(
        whole, whole.choice_of(plan.bits), budget=plan.budget, selector=plan.selector, settings=dict(plan.settings),
        codes={s.name: s.code for s in plan.sites},
    ).replace(quantizer=plan.quantizer, quantizer_options=plan.quantizer_options)  # fmt: skip
    if problem is not None:
        return recosted
    if any(a.omega != b.omega or a.scale != b.scale for a, b in zip(plan.sites, recosted.sites)):
        costs = dict(recosted.costs) | _overhead(plan)
        return recosted.replace(selector="manual", costs=costs, settings=dict(plan.settings))
    return plan.replace(costs=dict(plan.costs) | dict(recosted.costs) | _overhead(plan))


def _overhead(plan: Plan) -> dict[str, float]:
    return {k: v for k, v in plan.costs.items() if k in ("file_overhead", "weight_scales")}


def _rest(plan: Plan) -> tuple[FloatTensor, ...] | None:
    """What the plan's costs tell of the model beside its sites, as one tensor."""
    full = plan.costs.get("float_model_bytes")
    if full is None:
        return None
    rest = int(full) - sum(4 * s.numel for s in plan.weights)
    kept = int(plan.costs.get("kept_bytes", rest))  # plans of earlier releases counted one for the other
    return (FloatTensor("", kept, "not listed in plans", float32_bytes=rest),)


def _candidate(problem: Problem, site: int, bits: int, code: str | None) -> Candidate:
    candidates = problem.candidates[problem.sites[site].name]
    preferred = [c for c in candidates if c.bits == bits and c.code == code and math.isfinite(c.omega)]
    return min(preferred, key=lambda c: c.omega) if preferred else candidates[problem.best[site][bits][0]]


def _plain(budget: object) -> object:
    return {str(k): v for k, v in budget.items()} if isinstance(budget, Mapping) else budget
