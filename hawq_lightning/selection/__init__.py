"""Traces, perturbations and costs -> frontier -> plan (paper section 2.3). Plain numbers; no Lightning, no Hydra."""

from hawq_lightning.selection import _baselines, _built_in_costs, _energy, _haq, _search  # noqa: F401  they register themselves
from hawq_lightning.selection._activation_memory import activation_steps
from hawq_lightning.selection._bootstrap import Stability, bootstrap_stability, with_bootstrap_stability
from hawq_lightning.selection._budget import UpperLimit, parse_budget, read_budget, tables_of_budget
from hawq_lightning.selection._cost import Cost, LayerCost, SiteCost, table_of
from hawq_lightning.selection._costs import (
    COSTS,
    available_costs,
    cost_of,
    cost_rows,
    costs_of,
    format_cost,
    register_cost,
)
from hawq_lightning.selection._coupling import group_frontier
from hawq_lightning.selection._energy import HOROWITZ_45NM, EnergyTable
from hawq_lightning.selection._feasible import check_feasible, nominal_problem
from hawq_lightning.selection._latency import LatencyTable
from hawq_lightning.selection._linear_cost import LinearCost
from hawq_lightning.selection._loss_budget import LossBudget, loss_budget
from hawq_lightning.selection._milp import solve
from hawq_lightning.selection._monotone import monotone_frontier, set_b, set_b_size, trace_order
from hawq_lightning.selection._outlook import MeasuredPlan, Outlook, forecast_of, omega_table
from hawq_lightning.selection._outlook_plans import PASSES, hold_against, look_ahead
from hawq_lightning.selection._pareto import Block
from hawq_lightning.selection._plan_frontier import PlanFrontier, plan_frontier
from hawq_lightning.selection._plans import problem_of, recost
from hawq_lightning.selection._problem import Problem
from hawq_lightning.selection._request import Request
from hawq_lightning.selection._scores import SCORES, Score, register_score
from hawq_lightning.selection._select import select
from hawq_lightning.selection._select_by_loss import NO_CLASSES, select_by_loss
from hawq_lightning.selection._selectors import SELECTORS, Selector, register_selector
from hawq_lightning.selection._settings import constraints_of
from hawq_lightning.selection._smallest_plan import smallest_plan
from hawq_lightning.selection._stable_plan import StablePlan
from hawq_lightning.selection._sweep import Frontier, frontier, sweep
from hawq_lightning.selection._tradeoff import sample_set_b, save_tradeoff, set_b_count, tradeoff, uniform_points
from hawq_lightning.selection._units import BIT_OPERATIONS, BYTES, MILLISECONDS, Unit

__all__ = [
    "BIT_OPERATIONS",
    "BYTES",
    "COSTS",
    "HOROWITZ_45NM",
    "MILLISECONDS",
    "NO_CLASSES",
    "PASSES",
    "SCORES",
    "SELECTORS",
    "Block",
    "Cost",
    "EnergyTable",
    "Frontier",
    "LatencyTable",
    "LayerCost",
    "LinearCost",
    "LossBudget",
    "MeasuredPlan",
    "Outlook",
    "PlanFrontier",
    "Problem",
    "Request",
    "Score",
    "Selector",
    "SiteCost",
    "Stability",
    "StablePlan",
    "Unit",
    "UpperLimit",
    "activation_steps",
    "available_costs",
    "bootstrap_stability",
    "check_feasible",
    "constraints_of",
    "cost_of",
    "cost_rows",
    "costs_of",
    "forecast_of",
    "format_cost",
    "frontier",
    "group_frontier",
    "hold_against",
    "look_ahead",
    "loss_budget",
    "monotone_frontier",
    "nominal_problem",
    "omega_table",
    "parse_budget",
    "plan_frontier",
    "problem_of",
    "read_budget",
    "recost",
    "register_cost",
    "register_score",
    "register_selector",
    "sample_set_b",
    "save_tradeoff",
    "select",
    "select_by_loss",
    "set_b",
    "set_b_count",
    "set_b_size",
    "smallest_plan",
    "solve",
    "sweep",
    "table_of",
    "tables_of_budget",
    "trace_order",
    "tradeoff",
    "uniform_points",
    "with_bootstrap_stability",
]
