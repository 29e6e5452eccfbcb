"""When to stop measuring: as soon as the plan no longer changes with the noise that is left in the traces."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from hawq_lightning._plan import Candidate
from hawq_lightning._site_table import SiteTable
from hawq_lightning.selection._bootstrap import stability
from hawq_lightning.selection._problem import Problem
from hawq_lightning.selection._select import select
from hawq_lightning.sensitivity import Sensitivity, guarded_mean_traces

Options = Mapping[str, Sequence[Candidate]]


@dataclass
class PlanSettled:
    """Answers, for traces as measured so far, whether more probes could still change the plan for the better.

    The rows of the traces are redrawn (bootstrap over images, with the noise of the probes that they hold), a plan is
    selected for each draw, and what the present plan loses against it in Ω is its regret.

    Args:
        table: the sites.
        options: from traces to the options of every site; called once, afterwards Ω is scaled with the traces.
        budget: as for :func:`hawq_lightning.select`.
        selector: ``pareto`` or ``monotone``.
        overhead: bytes of the packed file beside the codes.
        constraints: keywords of :class:`Problem`.
        asked: what else ``options`` depend on, such as the widths.
        regret: share of Ω that 95% of the draws may lose at the most.
        bootstraps: draws.
        seed: of the draws.
    """

    table: SiteTable
    options: Callable[[Sensitivity], Options]
    budget: Any
    selector: str = "pareto"
    overhead: int = 0
    constraints: Mapping[str, Any] = field(default_factory=dict)
    asked: str = ""
    regret: float = 0.01
    bootstraps: int = 40
    seed: int = 0
    _first: Options | None = field(default=None, init=False)
    _traces: dict[str, float] = field(default_factory=dict, init=False)

    @property
    def key(self) -> str:
        """What the answer depends on beside the traces: measurements that it ended are not those of other budgets."""
        of = [self.budget, self.selector, dict(self.constraints), self.asked, self.regret, self.bootstraps]
        return " ".join(map(str, of))

    def __call__(self, measured: Sensitivity) -> bool:
        """Whether 95% of the redrawn traces agree with the present plan within the regret."""
        now, _ = guarded_mean_traces(measured)
        if self._first is None:
            self._first, self._traces = self.options(measured), dict(now)
        scaled = {name: tuple(self._scaled(name, o, now) for o in found) for name, found in self._first.items()}
        problem = Problem(self.table, scaled, measured, self.overhead, **self.constraints)
        plan = select(problem, self.budget, self.selector)
        return stability(problem, plan, bootstraps=self.bootstraps, seed=self.seed).regret95 <= self.regret

    def _scaled(self, name: str, option: Candidate, now: Mapping[str, float]) -> Candidate:
        before = self._traces[name]
        # a site without curvature until now: its perturbation times its trace is what there is to say
        omega = option.omega * now[name] / before if before > 0 else option.perturbation * now[name]
        return replace(option, omega=max(0.0, omega))
