"""Budgets as people write them: ``12x``, ``3.5bit``, ``8MB``, ``{bops: 50%}``, ``{weights: 12x, act: 7.6x}``."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hawq_lightning.errors import HawqError, nearest
from hawq_lightning.selection.costs import eight_bit_cost, float_cost

if TYPE_CHECKING:
    from hawq_lightning.selection.problem import Problem

_BYTES = {"B": 1, "kB": 10**3, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
_OPS = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
_TIME = {"us": 1e-3, "ms": 1.0, "s": 1e3}
# what a user calls it -> the cost
_KEYS = {
    "weights": "weight_bytes",
    "weight_bytes": "weight_bytes",
    "file": "file_bytes",
    "file_bytes": "file_bytes",
    "bops": "bops",
    "act": "act_bytes",
    "activations": "act_bytes",
    "act_bytes": "act_bytes",
    "act_peak": "act_peak_bytes",
    "act_peak_bytes": "act_peak_bytes",
    "latency": "latency_ms",
    "latency_ms": "latency_ms",
}
_EXAMPLES = {
    "weight_bytes": ('"12x"', '"3.5bit"', '"8MiB"'),
    "file_bytes": ('"8MB"', '"8MiB"'),
    "bops": ('"50%"', '"20x"', '"1.5G"'),
    "act_bytes": ('"7.6x"', '"4bit"', '"2MiB"'),
    "act_peak_bytes": ('"256KiB"', '"4x"'),
    "latency_ms": ('"3ms"', '"50%"'),
}
_FORMS = 'use "12x", "3.5bit", "8MB", "8MiB", {bops: "50%"}, {act: "7.6x"}, {latency: "3ms"}, or several in one mapping'
_NUMBER = re.compile(r"([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)\s*(.*)")


@dataclass(frozen=True)
class Bound:
    """One upper limit: ``cost`` in its own unit, and the words that it came from."""

    cost: str
    limit: float
    text: str


def parse_budget(budget: Any, problem: Problem) -> tuple[Bound, ...]:
    """Turn a budget into limits on costs.

    Args:
        budget: text, or a mapping of ``weights``, ``file``, ``bops``, ``act``, ``act_peak``, ``latency`` or the name
            of an extra cost to text. ``x`` means times smaller than float32, ``%`` of the 8-bit network; MB 10^6 bytes.
        problem: what the relative forms refer to.

    Raises:
        HawqError: anything else; the message has the nearest valid form.
    """
    if isinstance(budget, str):
        number, unit = _split(budget, "budget")
        if unit in _BYTES:
            return (_bound("file_bytes", budget, number, unit, problem),)
        if unit.lower() in ("x", "bit", "bits"):
            return (_bound("weight_bytes", budget, number, unit, problem),)
        raise HawqError(f"The budget {budget!r} is not understood{_guess(number, unit)}; {_FORMS}.")
    if isinstance(budget, Mapping):
        if not budget:
            raise HawqError(f"The budget is empty; {_FORMS}.")
        bounds = []
        for key, given in budget.items():
            cost = key if key in problem.extra_costs else _KEYS.get(str(key))
            if cost is None:
                known = [*dict.fromkeys(k for k in _KEYS if "_" not in k or k == "act_peak"), *problem.extra_costs]
                raise HawqError(f"There is no budget for {key!r}; use {', '.join(known)}.{nearest(str(key), known)}")
            if isinstance(given, (int, float)) and not isinstance(given, bool) and (cost == key or cost == "bops"):
                bounds.append(Bound(cost, _positive(float(given), f"{key}: {given}"), f"{key}: {given}"))
                continue
            if not isinstance(given, str) or cost in problem.extra_costs:
                hint = f"use {' or '.join(_EXAMPLES.get(cost, ('a number',)))}"
                raise HawqError(f"The budget {{{key}: {given!r}}} is not understood; {hint}.")
            number, unit = _split(given, f"budget {{{key}: ...}}")
            bounds.append(_bound(cost, f"{key}: {given}", number, unit, problem))
        return tuple(bounds)
    if isinstance(budget, (int, float)) and not isinstance(budget, bool):
        raise HawqError(
            f'A budget of {budget} has no unit; did you mean "{budget:g}x", "{budget:g}bit" or "{budget:g}MB"?'
        )
    raise HawqError(f"A budget of {budget!r} is not understood; {_FORMS}.")


def _bound(cost: str, text: str, number: float, unit: str, problem: Problem) -> Bound:
    number = _positive(number, text)
    if unit in ("x", "X") and cost != "latency_ms":
        return Bound(cost, _full(problem, cost, text) / number, text)
    if unit == "%" and cost in ("bops", "latency_ms", "act_peak_bytes", "act_bytes", "weight_bytes"):
        problem.cost(cost)
        return Bound(cost, eight_bit_cost(problem, cost) * number / 100, text)
    if unit.lower() in ("bit", "bits") and cost in ("weight_bytes", "act_bytes"):
        return Bound(cost, _full(problem, cost, text) * number / 32, text)
    if unit in _BYTES and cost.endswith("_bytes"):
        return Bound(cost, number * _BYTES[unit], text)
    if unit in _OPS and cost == "bops":
        return Bound(cost, number * _OPS[unit], text)
    if unit in _TIME and cost == "latency_ms":
        return Bound(cost, number * _TIME[unit], text)
    examples = [e.strip('"') for e in _EXAMPLES[cost]]
    close = next((e for e in examples if unit and e.lower().endswith(unit.lower())), examples[0])
    raise HawqError(
        f"The budget {text!r} is not understood; for {cost} use for example "
        f"{', '.join(_EXAMPLES[cost])} (nearest: {close!r})."
    )


def _full(problem: Problem, cost: str, text: str) -> float:
    problem.cost(cost)  # says what is missing
    full = float_cost(problem, cost)
    if not full > 0:
        raise HawqError(f"The budget {text!r} has no meaning here: {cost} is 0 at float32.")
    return full


def _split(text: str, what: str) -> tuple[float, str]:
    found = _NUMBER.fullmatch(text.strip())
    if not found:
        raise HawqError(f"The {what} {text!r} does not start with a number; {_FORMS}.")
    return float(found[1]), found[2].strip()


def _guess(number: float, unit: str) -> str:
    units = {u.lower(): u for u in ("x", "bit", *_BYTES)}
    close = units.get(unit.lower()) or next(
        (u for low, u in units.items() if unit and low.startswith(unit.lower()[:1])), None
    )
    if unit == "%":
        return f' (nearest: {{bops: "{number:g}%"}})'
    if unit in _TIME:
        return f' (nearest: {{latency: "{number:g}{unit}"}})'
    return f' (nearest: "{number:g}{close or "x"}")'


def _positive(number: float, text: str) -> float:
    if not 0 < number < math.inf:
        raise HawqError(f"The budget {text!r} must be a positive number; {_FORMS}.")
    return number
