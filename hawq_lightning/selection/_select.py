"""One call from numbers to a plan."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path

from hawq_lightning._errors import HawqError
from hawq_lightning._plan import Plan
from hawq_lightning._progress import seconds_since
from hawq_lightning.selection._budget import parse_budget
from hawq_lightning.selection._loss_budget import loss_budget
from hawq_lightning.selection._plans import make_plan
from hawq_lightning.selection._problem import Problem
from hawq_lightning.selection._request import Request
from hawq_lightning.selection._selectors import SELECTORS


def select(
    problem: Problem,
    budget: object = None,
    selector: str = "pareto",
    *,
    seed: int = 0,
    eigenvalues: Mapping[str, float] | None = None,
    measure_loss: Callable[[Plan], float] | None = None,
    bits: Mapping[str, int] | str | Path | None = None,
    trials: int = 100,
) -> Plan:
    """Choose bits for every site (paper section 2.3).

    Numbers from anywhere: ``select(Problem.from_arrays(names, (2, 4, 8), omega, numel), "12x")``.

    Args:
        problem: sites, candidates, constraints, score.
        budget: such as ``"12x"`` or ``{"weights": "12x", "act": "7.6x"}`` (see
            :func:`hawq_lightning.selection.parse_budget`); may be None for ``manual``. Not by loss: see
            :func:`hawq_lightning.selection.select_by_loss`.
        selector: registered name, see :data:`hawq_lightning.selection.SELECTORS`.
        seed: of ``random``.
        eigenvalues: site name -> top Hessian eigenvalue, for ``top_eigenvalue`` and ``hawq``.
        measure_loss: plan -> loss, for ``accuracy`` and the searches.
        bits: site -> bits or a file, for ``manual`` (and ``hawq``).
        trials: plans that a search (``haq``, ``optuna``, ``random_search``) measures.

    Raises:
        HawqError: an unknown selector or budget, something that the selector lacks, or no plan that fits; then with the
            cheapest feasible cost by each budget.
    """
    entry = SELECTORS[selector]
    entry.check(budget, bits)
    if (loss := loss_budget(budget)) is not None:
        raise HawqError(
            f"The budget {loss.words()!r} is by loss, for which plans have to be measured: use the callback HAWQ, or "
            "hawq_lightning.selection.select_by_loss."
        )
    limits = () if budget is None else parse_budget(budget, problem)
    request = Request(problem, limits, seed, eigenvalues, measure_loss, bits, trials=trials)
    began = time.perf_counter()
    choice = entry.choose(request)
    settings: dict[str, object] = {
        "selector_seed": seed,
        "selection_seconds": round(seconds_since(began), 4),
    } | request.notes
    return make_plan(problem, choice, budget=budget, selector=selector, settings=settings)
