"""Traces, perturbations and costs -> frontier -> plan (paper section 2.3). Plain numbers; no Lightning, no Hydra."""

from hawq_lightning.selection._activation_memory import activation_steps
from hawq_lightning.selection._bootstrap import Stability, stability, with_bootstrap_stability
from hawq_lightning.selection._budget import Bound, parse_budget, read_budget
from hawq_lightning.selection._coupling import group_frontier
from hawq_lightning.selection._feasible import check_feasible, nominal_problem
from hawq_lightning.selection._frontier import Block, Frontier, frontier, sweep
from hawq_lightning.selection._latency import LatencyTable
from hawq_lightning.selection._milp import solve
from hawq_lightning.selection._monotone import monotone_frontier, set_b, set_b_size, trace_order
from hawq_lightning.selection._plans import PlanFrontier, available_costs, problem_of, recost
from hawq_lightning.selection._problem import Problem
from hawq_lightning.selection._request import shown
from hawq_lightning.selection._select import select
from hawq_lightning.selection._selectors import SELECTORS, check_selector
from hawq_lightning.selection._settings import constraints_of
from hawq_lightning.selection._stable_plan import PlanSettled
from hawq_lightning.selection._tradeoff import sample_set_b, save_tradeoff, set_b_count, tradeoff

__all__ = [
    "SELECTORS",
    "Block",
    "Bound",
    "Frontier",
    "LatencyTable",
    "PlanFrontier",
    "PlanSettled",
    "Problem",
    "Stability",
    "activation_steps",
    "available_costs",
    "check_feasible",
    "check_selector",
    "constraints_of",
    "frontier",
    "group_frontier",
    "monotone_frontier",
    "nominal_problem",
    "parse_budget",
    "problem_of",
    "read_budget",
    "recost",
    "sample_set_b",
    "save_tradeoff",
    "select",
    "set_b",
    "set_b_count",
    "set_b_size",
    "shown",
    "solve",
    "stability",
    "sweep",
    "trace_order",
    "tradeoff",
    "with_bootstrap_stability",
]
