"""Traces, perturbations and costs -> frontier -> plan (paper section 2.3). Plain numbers; no Lightning, no Hydra."""

from hawq_lightning.selection.baselines import SELECTORS, check_selector
from hawq_lightning.selection.budget import Bound, parse_budget, read_budget
from hawq_lightning.selection.frontier import Frontier, frontier
from hawq_lightning.selection.latency import LatencyTable
from hawq_lightning.selection.monotone import set_b, set_b_size
from hawq_lightning.selection.nominal import check_feasible, nominal_problem
from hawq_lightning.selection.peak import activation_steps
from hawq_lightning.selection.plans import PlanFrontier, problem_of, recost
from hawq_lightning.selection.problem import Problem
from hawq_lightning.selection.robustness import Stability, stability, with_stability
from hawq_lightning.selection.select import select
from hawq_lightning.selection.settled import PlanSettled
from hawq_lightning.selection.tradeoff import save_tradeoff, set_b_count, tradeoff

__all__ = [
    "SELECTORS",
    "Bound",
    "Frontier",
    "LatencyTable",
    "PlanFrontier",
    "PlanSettled",
    "Problem",
    "Stability",
    "activation_steps",
    "check_feasible",
    "check_selector",
    "frontier",
    "nominal_problem",
    "parse_budget",
    "problem_of",
    "read_budget",
    "recost",
    "save_tradeoff",
    "select",
    "set_b",
    "set_b_count",
    "set_b_size",
    "stability",
    "tradeoff",
    "with_stability",
]
