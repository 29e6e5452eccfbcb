"""Budgets by loss: ``{kl: 0.02}``, ``{agreement: 99%}``, alone or beside limits on costs, and of which network."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import get_args

from hawq_lightning._errors import HawqError, choice
from hawq_lightning.quantization import After

LOSS_WORDS = ("kl", "agreement")
AFTER = "after"
LOSS_EXAMPLES = ("{kl: 0.02}", '{agreement: "99%"}')
_NUMBER = re.compile(r"\s*([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)\s*(%?)\s*")


@dataclass(frozen=True)
class LossBudget:
    """What a budget says of the loss.

    Attributes:
        kl: the most that the outputs may diverge from the float network's, in nats; ``None``: no limit.
        changed: the largest share of predictions that may become others, 0 to 1; ``None``: no limit.
        after: of which network both are meant.
    """

    kl: float | None = None
    changed: float | None = None
    after: After = "quantizing"

    def words(self) -> str:
        """As a budget is written: ``kl 0.02, agreement 99%``."""
        parts = [] if self.kl is None else [f"kl {self.kl:g}"]
        parts += [] if self.changed is None else [f"agreement {100 * (1 - self.changed):g}%"]
        again = " with BatchNorm statistics measured again" if self.after != "quantizing" else ""
        return ", ".join(parts) + again


def loss_budget(budget: object) -> LossBudget | None:
    """The part of a budget that is about the loss; ``None``: there is none.

    Args:
        budget: as the user gave it.

    Raises:
        HawqError: a figure that is not understood; the message has the nearest valid form.
    """
    if not isinstance(budget, Mapping) or not {*LOSS_WORDS, AFTER} & {*budget}:
        return None
    if not {*LOSS_WORDS} & {*budget}:
        raise HawqError(
            f"The budget has {AFTER!r}, which says of what network a budget by loss is meant, and no such budget: give "
            f"{' or '.join(LOSS_EXAMPLES)} beside it."
        )
    return LossBudget(
        _kl(budget["kl"]) if "kl" in budget else None,
        _changed(budget["agreement"]) if "agreement" in budget else None,
        choice(f"{AFTER} in the budget", budget.get(AFTER, "quantizing"), get_args(After)),
    )


def _kl(value: object) -> float:
    number, percent = _read(value, "kl")
    if percent:
        raise _misread("kl", value, "a divergence in nats such as 0.02", f"{number / 100:g}")
    if not 0 < number < math.inf:
        raise _misread("kl", value, "a divergence in nats above 0, such as 0.02", f"{abs(number) or 0.02:g}")
    return number


def _changed(value: object) -> float:
    number, percent = _read(value, "agreement")
    if not percent and 1 < number <= 100:
        raise _misread("agreement", value, 'a share of the predictions such as "99%" or 0.99', f'"{number:g}%"')
    share = number / 100 if percent else number
    if not 0 < share <= 1:
        raise _misread("agreement", value, 'a share of the predictions such as "99%" or 0.99', '"99%"')
    return round(1 - share, 12)  # 1 - 0.99 is more than 0.01


def _read(value: object, word: str) -> tuple[float, bool]:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value), False
    match = _NUMBER.fullmatch(value) if isinstance(value, str) else None
    if match is None:
        example = LOSS_EXAMPLES[LOSS_WORDS.index(word)]
        raise HawqError(f"The budget {{{word}: {value!r}}} is not understood; use for example {example}.")
    return float(match[1]), bool(match[2])


def _misread(word: str, value: object, what: str, near: str) -> HawqError:
    return HawqError(f"The budget {{{word}: {value!r}}} is not understood; it is {what} (nearest: {{{word}: {near}}}).")
