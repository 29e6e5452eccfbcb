"""Search by measured loss: plans are tried one after the other, and the best one is kept.

HAQ's agent (Wang et al., CVPR 2019), Optuna's sampler and chance take the same number of trials and the same steps down
to the budget, so that they can be compared.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from hawq_lightning._errors import HawqError
from hawq_lightning._extra import require
from hawq_lightning.selection._milp import solve
from hawq_lightning.selection._plans import make_plan
from hawq_lightning.selection._request import Request, infeasible
from hawq_lightning.selection._selectors import Need, register_selector

_NEEDS: tuple[Need, ...] = ("budget", "loss")


class Trials:
    """Plans that were tried, and the best of them.

    Args:
        request: with its budget and a function that measures.
        name: of the selector, for messages and plans.

    Attributes:
        reference: loss with the most bits everywhere, which rewards are relative to.
        losses: of every trial, in order.

    Raises:
        HawqError: no function that measures, or no plan that fits.
    """

    def __init__(self, request: Request, name: str) -> None:
        if request.measure_loss is None:
            raise HawqError(f"The selector {name!r} needs measure_loss: a function from a plan to its measured loss.")
        if solve(request.problem, request.limits) is None:
            raise HawqError(infeasible(request))
        self.request, self.name = request, name
        self.losses: list[float] = []
        self.widths = [len(g.bits) for g in request.problem.groups]
        self._measured: dict[tuple[int, ...], float] = {}
        self._best: tuple[float, list[int]] | None = None
        self.reference = self._loss([n - 1 for n in self.widths])

    def step_down(self, wanted: Sequence[int]) -> list[int]:
        """The choice with one bit-width less, group by group from the first, until it fits (section 3.2 of HAQ)."""
        choice = list(wanted)
        while not self.request.fits(choice):
            lowered = False
            for g, k in enumerate(choice):
                if k and not self.request.fits(choice):
                    choice[g], lowered = k - 1, True
            if not lowered:  # a device's pairs: the nearest choice that fits
                away = [np.abs(np.arange(n) - k).astype(float) for n, k in zip(self.widths, wanted)]
                return self.request.argmin(away)
        return choice

    def __call__(self, wanted: Sequence[int]) -> float:
        """Loss of the choice that the wanted one becomes under the budget."""
        choice = self.step_down(wanted)
        loss = self._loss(choice)
        self.losses.append(loss)
        if self._best is None or loss < self._best[0]:
            self._best = (loss, choice)
        return loss

    def best(self) -> list[int]:
        """The choice of least loss; what was measured goes into the plan's settings."""
        assert self._best is not None
        told = {"measurements": len(self._measured), "trials": len(self.losses), "loss": self._best[0]}
        self.request.notes.update(told)
        return self._best[1]

    def at(self, group: int, share: float) -> int:
        """Position of the width that a number from 0 to 1 stands for (equation 3 of HAQ, over the widths on offer)."""
        return min(self.widths[group] - 1, int(share * self.widths[group]))

    def _loss(self, choice: list[int]) -> float:
        key = tuple(choice)
        if key not in self._measured:
            assert self.request.measure_loss is not None
            loss = float(self.request.measure_loss(make_plan(self.request.problem, choice, selector=self.name)))
            if math.isnan(loss):
                raise HawqError(f"measure_loss returned NaN at measurement {len(self._measured) + 1}.")
            self._measured[key] = loss
        return self._measured[key]


@register_selector("random_search", needs=_NEEDS, offers=("without_traces",))
def random_search(request: Request) -> list[int]:
    """The best of some plans drawn at random: what a search has to beat."""
    trials, generator = Trials(request, "random_search"), np.random.default_rng(request.seed)
    for _ in range(request.trials):
        trials([trials.at(g, x) for g, x in enumerate(generator.random(len(trials.widths)))])
    return trials.best()


@register_selector("optuna", needs=_NEEDS, offers=("without_traces",))
def optuna_search(request: Request) -> list[int]:
    """Optuna's tree-structured Parzen estimator over the widths of all groups (extra ``search``)."""
    optuna, trials = require("optuna"), Trials(request, "optuna")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=request.seed, multivariate=False))
    for _ in range(request.trials):
        trial = study.ask()
        study.tell(trial, trials([trial.suggest_int(f"group {g}", 0, n - 1) for g, n in enumerate(trials.widths)]))
    return trials.best()
