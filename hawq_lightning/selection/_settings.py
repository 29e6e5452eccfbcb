"""What only selection knows of a :class:`SelectConfig`: budgets, selectors, constraints, latency tables."""

from __future__ import annotations

from collections.abc import Mapping
from inspect import Parameter, signature
from pathlib import Path
from typing import Any

from hawq_lightning._config import SelectConfig, config_check
from hawq_lightning._errors import HawqError, nearest
from hawq_lightning._io import read_json
from hawq_lightning.selection._budget import read_budget
from hawq_lightning.selection._latency import LatencyTable
from hawq_lightning.selection._problem import Problem
from hawq_lightning.selection._selectors import check_selector

CONSTRAINTS = tuple(p.name for p in signature(Problem).parameters.values() if p.kind is Parameter.KEYWORD_ONLY)


@config_check(SelectConfig)
def check_select(config: SelectConfig) -> None:
    """Refuse what can be told to be wrong before there is a network.

    Raises:
        HawqError: a budget that cannot be read or that lacks its table, an unknown selector or constraint, a file that
            cannot be read.
    """
    check_selector(config.selector, config.budget, config.bits)
    if isinstance(config.bits, (str, Path)):
        read_json(config.bits, "manual plan")
    for key in config.constraints or {}:
        if key not in CONSTRAINTS:
            names = ", ".join(CONSTRAINTS)
            raise HawqError(f"There is no constraint {key!r}; use one of {names}.{nearest(str(key), CONSTRAINTS)}")
    if config.budget is not None:
        read_budget(config.budget, (config.constraints or {}).get("extra_costs") or ())
    timed = isinstance(config.budget, Mapping) and "latency" in config.budget
    if constraints_of(config).get("latency") is None and timed:
        raise HawqError("A latency budget needs a latency table: give latency=latency.csv (select.latency=...).")


def constraints_of(config: SelectConfig) -> dict[str, Any]:
    """Keywords of :class:`Problem`, with the latency table read from its file.

    Raises:
        HawqError: the table cannot be read.
    """
    table = {} if config.latency is None else {"latency": LatencyTable.load(config.latency)}
    return {**(config.constraints or {}), **table}
