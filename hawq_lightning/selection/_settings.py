"""What only selection knows of a :class:`SelectConfig`: budgets, selectors, constraints, latency tables."""

from __future__ import annotations

from inspect import Parameter, signature
from pathlib import Path
from typing import Any

from hawq_lightning._config import SelectConfig, config_check
from hawq_lightning._errors import HawqError, nearest
from hawq_lightning._io import PLAN_JSON, read_json
from hawq_lightning.selection._budget import tables_of_budget
from hawq_lightning.selection._by_size import check_sizes
from hawq_lightning.selection._energy import EnergyTable
from hawq_lightning.selection._latency import LatencyTable
from hawq_lightning.selection._loss_budget import loss_budget
from hawq_lightning.selection._problem import Problem
from hawq_lightning.selection._scores import DEFAULT_SCORE, SCORES
from hawq_lightning.selection._selectors import SELECTORS

CONSTRAINTS = tuple(
    p.name for p in signature(Problem).parameters.values() if p.kind is Parameter.KEYWORD_ONLY and p.name != "score"
)


@config_check(SelectConfig)
def check_select(config: SelectConfig) -> None:
    """Refuse what can be told to be wrong before there is a network.

    Raises:
        HawqError: a budget that cannot be read or that lacks its table, an unknown selector or constraint, a file that
            cannot be read.
    """
    SELECTORS[config.selector].check(config.budget, config.bits)
    SCORES.check(config.score)
    if loss_budget(config.budget) is not None:
        check_sizes(config.selector)
    if isinstance(config.bits, (str, Path)):
        read_json(config.bits, "manual plan", PLAN_JSON)
    for key in config.constraints or {}:
        if key not in CONSTRAINTS:
            names = ", ".join(CONSTRAINTS)
            raise HawqError(f"There is no constraint {key!r}; use one of {names}.{nearest(str(key), CONSTRAINTS)}")
    given = constraints_of(config)
    tables = {
        "steps",
        *(k for k, v in given.items() if v is not None),
        *(given.get("tables") or ()),
    }  # steps are watched
    for name, message in tables_of_budget(config.budget, given.get("extra_costs") or ()).items():
        if name not in tables:
            raise HawqError(message)


def constraints_of(config: SelectConfig) -> dict[str, Any]:
    """Keywords of :class:`Problem`, with the latency table read from its file, and the score where it is another.

    Raises:
        HawqError: a table cannot be read.
    """
    table: dict[str, Any] = {} if config.latency is None else {"latency": LatencyTable.load(config.latency)}
    if config.energy is not None:
        own = (config.constraints or {}).get("tables") or {}
        table["tables"] = {**own, "energy": EnergyTable.load(config.energy)}
    score = {} if config.score == DEFAULT_SCORE else {"score": config.score}
    return {**(config.constraints or {}), **table, **score}
