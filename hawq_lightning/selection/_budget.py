"""Budgets as people write them: ``12x``, ``3.5bit``, ``8MB``, ``{bops: 50%}``, ``{weights: 12x, act: 7.6x}``."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hawq_lightning._errors import HawqError, nearest
from hawq_lightning.selection._costs import eight_bit_cost, float_cost

if TYPE_CHECKING:
    from hawq_lightning.selection._problem import Problem

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


@dataclass(frozen=True)
class Asked:
    """A budget as it was written: which cost, how much, in which unit ("" of a plain number)."""

    cost: str
    number: float
    unit: str
    text: str


def read_budget(budget: Any, extra_costs: Collection[str] = ()) -> tuple[Asked, ...]:
    """Understand a budget, whatever it will mean for a network.

    Args:
        budget: text, or a mapping of ``weights``, ``file``, ``bops``, ``act``, ``act_peak``, ``latency`` or the name
            of an extra cost to text. ``x`` means times smaller than float32, ``%`` of the 8-bit network; MB 10^6 bytes.
        extra_costs: names of the user's own.

    Raises:
        HawqError: anything else; the message has the nearest valid form.
    """
    if isinstance(budget, str):
        number, unit = _split(budget, "budget")
        if unit in _BYTES:
            return (_asked("file_bytes", number, unit, budget),)
        if unit.lower() in ("x", "bit", "bits"):
            return (_asked("weight_bytes", number, unit, budget),)
        raise HawqError(f"The budget {budget!r} is not understood{_guess(number, unit)}; {_FORMS}.")
    if isinstance(budget, Mapping):
        if not budget:
            raise HawqError(f"The budget is empty; {_FORMS}.")
        found = []
        for key, given in budget.items():
            cost = key if key in extra_costs else _KEYS.get(str(key))
            if cost is None:
                known = [*dict.fromkeys(k for k in _KEYS if "_" not in k or k == "act_peak"), *extra_costs]
                raise HawqError(f"There is no budget for {key!r}; use {', '.join(known)}.{nearest(str(key), known)}")
            if isinstance(given, (int, float)) and not isinstance(given, bool) and (cost == key or cost == "bops"):
                found.append(Asked(cost, _positive(float(given), f"{key}: {given}"), "", f"{key}: {given}"))
                continue
            if not isinstance(given, str) or cost in extra_costs:
                hint = f"use {' or '.join(_EXAMPLES.get(cost, ('a number',)))}"
                raise HawqError(f"The budget {{{key}: {given!r}}} is not understood; {hint}.")
            number, unit = _split(given, f"budget {{{key}: ...}}")
            found.append(_asked(cost, number, unit, f"{key}: {given}"))
        return tuple(found)
    if isinstance(budget, (int, float)) and not isinstance(budget, bool):
        raise HawqError(
            f'A budget of {budget} has no unit; did you mean "{budget:g}x", "{budget:g}bit" or "{budget:g}MB"?'
        )
    raise HawqError(f"A budget of {budget!r} is not understood; {_FORMS}.")


def parse_budget(budget: Any, problem: Problem) -> tuple[Bound, ...]:
    """Turn a budget into limits on costs.

    Args:
        budget: see :func:`read_budget`.
        problem: what the relative forms refer to.

    Raises:
        HawqError: a budget that is not understood, or a cost that the problem has no numbers for.
    """
    return tuple(Bound(a.cost, _limit(a, problem), a.text) for a in read_budget(budget, problem.extra_costs))


def _asked(cost: str, number: float, unit: str, text: str) -> Asked:
    number, low = _positive(number, text), unit.lower()
    known = (
        (low == "x" and cost != "latency_ms")
        or (unit == "%" and cost != "file_bytes")
        or (low in ("bit", "bits") and cost in ("weight_bytes", "act_bytes"))
        or (unit in _BYTES and cost.endswith("_bytes"))
        or (unit in _OPS and cost == "bops")
        or (unit in _TIME and cost == "latency_ms")
    )
    if known:
        return Asked(cost, number, unit if unit in _OPS or unit in _BYTES else low, text)
    examples = [e.strip('"') for e in _EXAMPLES[cost]]
    close = next((e for e in examples if unit and e.lower().endswith(low)), examples[0])
    raise HawqError(
        f"The budget {text!r} is not understood; for {cost} use for example "
        f"{', '.join(_EXAMPLES[cost])} (nearest: {close!r})."
    )


def _limit(asked: Asked, problem: Problem) -> float:
    cost, number, unit = asked.cost, asked.number, asked.unit
    if unit == "x":
        return _full(problem, cost, asked.text) / number
    if unit == "%":
        problem.cost(cost)  # says what is missing
        return eight_bit_cost(problem, cost) * number / 100
    if unit in ("bit", "bits"):
        return _full(problem, cost, asked.text) * number / 32
    if cost.endswith("_bytes") and unit in _BYTES:
        return number * _BYTES[unit]
    return number * (_OPS | _TIME)[unit]


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
