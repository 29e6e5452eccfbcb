"""Budgets as people write them: ``12x``, ``3.5bit``, ``8MB``, ``{bops: 50%}``, ``{weights: 12x, act: 7.6x}``.

Which words, units and relative forms there are, the registered costs say.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from hawq_lightning._errors import HawqError, nearest
from hawq_lightning.selection._cost import Cost
from hawq_lightning.selection._costs import COSTS, cost_named, cost_rows
from hawq_lightning.selection._loss_budget import AFTER, LOSS_EXAMPLES, LOSS_WORDS, loss_budget
from hawq_lightning.selection._problem import Problem

_NUMBER = re.compile(r"([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)\s*(.*)")


@dataclass(frozen=True)
class UpperLimit:
    """``cost`` is at most ``limit``, in the cost's own unit; ``text``: the words that it came from."""

    cost: str
    limit: float
    text: str


@dataclass(frozen=True)
class BudgetTerm:
    """One part of a budget as it was written: which cost, how much, in which unit ("" of a plain number)."""

    cost: str
    number: float
    unit: str
    text: str


def read_budget(budget: object, extra_costs: Collection[str] = ()) -> tuple[BudgetTerm, ...]:
    """Understand what a budget says of costs, whatever it will mean for a network.

    What it says of the loss is checked, and is what :func:`loss_budget` returns.

    Args:
        budget: text, or a mapping of a cost's word or name to text. ``x`` means times smaller than float32, ``%`` of
            the 8-bit network; MB 10^6 bytes, MiB 2^20.
        extra_costs: names of costs that the problem brings.

    Raises:
        HawqError: anything else; the message has the nearest valid form.
    """
    if isinstance(budget, str):
        number, unit = _split(budget, "budget")
        for name in COSTS:
            if unit in COSTS[name].bare or unit.lower() in COSTS[name].bare:
                return (_term(COSTS[name], number, unit, budget),)
        raise HawqError(f"The budget {budget!r} is not understood{_guess(number, unit)}; {_forms()}.")
    if isinstance(budget, Mapping):
        if not budget:
            raise HawqError(f"The budget is empty; {_forms()}.")
        loss_budget(budget)
        costs = {k: v for k, v in budget.items() if k in extra_costs or k not in (*LOSS_WORDS, AFTER)}
        return tuple(_read_entry(key, value, extra_costs) for key, value in costs.items())
    if isinstance(budget, (int, float)) and not isinstance(budget, bool):
        raise HawqError(
            f'A budget of {budget} has no unit; did you mean "{budget:g}x", "{budget:g}bit" or "{budget:g}MB"?'
        )
    raise HawqError(f"A budget of {budget!r} is not understood; {_forms()}.")


def parse_budget(budget: object, problem: Problem) -> tuple[UpperLimit, ...]:
    """Turn a budget into limits on costs; there are none in a budget that is by loss alone.

    Args:
        budget: see :func:`read_budget`.
        problem: what the relative forms refer to.

    Raises:
        HawqError: a budget that is not understood, or a cost that the problem has no numbers for.
    """
    terms = read_budget(budget, problem.extra_costs or ())
    return tuple(UpperLimit(t.cost, _limit(t, problem), t.text) for t in terms)


def tables_of_budget(budget: object, extra_costs: Collection[str] = ()) -> dict[str, str]:
    """Tables that the costs of a budget need -> the sentence that asks for one.

    Args:
        budget: see :func:`read_budget`; ``None``: no budget.
        extra_costs: names of costs that the problem brings.

    Raises:
        HawqError: a budget that is not understood.
    """
    if budget is None:
        return {}
    costs = [COSTS[t.cost] for t in read_budget(budget, extra_costs) if t.cost not in extra_costs]
    return {cost.table: cost.without_table for cost in costs if cost.table}


def _read_entry(key: object, value: object, extra_costs: Collection[str]) -> BudgetTerm:
    text = f"{key}: {value}"
    if key in extra_costs:
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return BudgetTerm(str(key), _positive(float(value), text), "", text)
        raise HawqError(f"The budget {{{key}: {value!r}}} is not understood; use a number.")
    named = [COSTS[n] for n in COSTS if key == n or key in COSTS[n].words]
    cost = next((c for c in named if c.name == key), named[-1] if named else None)  # a user's own before the package's
    if cost is None:
        words = [*dict.fromkeys((COSTS[n].words or (n,))[0] for n in COSTS), *LOSS_WORDS, *extra_costs]
        raise HawqError(f"There is no budget for {key!r}; use {', '.join(words)}.{nearest(str(key), words)}")
    if isinstance(value, (int, float)) and not isinstance(value, bool) and key == cost.name:
        return BudgetTerm(cost.name, _positive(float(value), text), "", text)  # its name says the unit
    if not isinstance(value, str):
        raise HawqError(f"The budget {{{key}: {value!r}}} is not understood; use {' or '.join(cost.examples)}.")
    number, unit = _split(value, f"budget {{{key}: ...}}")
    return _term(cost, number, unit, text)


def _term(cost: Cost, number: float, unit: str, text: str) -> BudgetTerm:
    number, low = _positive(number, text), unit.lower()
    if unit in cost.unit.suffixes:
        return BudgetTerm(cost.name, number, unit, text)
    form = "bit" if low == "bits" else low
    if form in cost.forms:
        return BudgetTerm(cost.name, number, form, text)
    examples = [e.strip('"') for e in cost.examples]
    close = next((e for e in examples if unit and e.lower().endswith(low)), examples[0])
    raise HawqError(
        f"The budget {text!r} is not understood; for {cost.name} use for example "
        f"{', '.join(cost.examples)} (nearest: {close!r})."
    )


def _limit(term: BudgetTerm, problem: Problem) -> float:
    cost = cost_named(problem, term.cost)
    if term.unit in cost.unit.suffixes:
        return term.number * cost.unit.suffixes[term.unit]
    if not term.unit:
        return term.number
    cost_rows(problem, term.cost)  # says what is missing
    if term.unit == "%":
        return cost.eight_bit(problem) * term.number / 100
    full = cost.float32(problem)
    if not full > 0:
        raise HawqError(f"The budget {term.text!r} has no meaning here: {term.cost} is 0 at float32.")
    return full / term.number if term.unit == "x" else full * term.number / 32


def _split(text: str, what: str) -> tuple[float, str]:
    match = _NUMBER.fullmatch(text.strip())
    if not match:
        raise HawqError(f"The {what} {text!r} does not start with a number; {_forms()}.")
    return float(match[1]), match[2].strip()


def _forms() -> str:
    """One sentence: what a budget may look like."""
    bare = [e for name in COSTS if COSTS[name].bare for e in COSTS[name].examples[:2]]
    named = [f"{{{_word(COSTS[n])}: {COSTS[n].examples[0]}}}" for n in COSTS if not COSTS[n].bare]
    return f"use {', '.join((*bare, *named, *LOSS_EXAMPLES))}, or several in one mapping"


def _word(cost: Cost) -> str:
    return (cost.words or (cost.name,))[0]


def _guess(number: float, unit: str) -> str:
    for name in COSTS:
        cost = COSTS[name]
        if not cost.bare and unit and (unit in cost.unit.suffixes or unit == cost.shown_as):
            return f' (nearest: {{{_word(cost)}: "{number:g}{unit}"}})'
    bare = {s.lower(): s for name in COSTS for s in COSTS[name].bare}
    close = bare.get(unit.lower()) or next(
        (s for low, s in bare.items() if unit and low.startswith(unit.lower()[:1])), "x"
    )
    return f' (nearest: "{number:g}{close}")'


def _positive(number: float, text: str) -> float:
    if not 0 < number < math.inf:
        raise HawqError(f"The budget {text!r} must be a positive number; {_forms()}.")
    return number
