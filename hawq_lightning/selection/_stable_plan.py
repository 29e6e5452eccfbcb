"""When to stop measuring: as soon as the plan no longer changes with the noise that is left in the traces."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from hawq_lightning._plan import Candidate
from hawq_lightning._site_table import SiteTable
from hawq_lightning.selection._bootstrap import bootstrap_stability
from hawq_lightning.selection._problem import Problem
from hawq_lightning.selection._select import select
from hawq_lightning.sensitivity import Sensitivity, guarded_mean_traces

Weighed = Mapping[str, Sequence[Candidate]]


@dataclass
class StablePlan:
    """Answers, for traces as measured so far, whether more probes could still change the plan for the better.

    The rows of the traces are redrawn (bootstrap over images, with the noise of the probes that they hold), a plan is
    selected for each draw, and what the present plan loses against it in Ω is its regret.

    Args:
        table: the sites.
        weigh: from traces to the candidates of every site; called once, afterwards Ω is scaled with the traces.
        budget: as for :func:`hawq_lightning.select`.
        selector: one that offers ``stable_plan``.
        overhead: bytes of the packed file beside the codes.
        constraints: keywords of :class:`Problem`.
        question: what else the candidates depend on, such as the widths.
        regret: share of Ω that 95% of the draws may lose at the most.
        bootstraps: draws.
        seed: of the draws.
    """

    table: SiteTable
    weigh: Callable[[Sensitivity], Weighed]
    budget: object
    selector: str = "pareto"
    overhead: int = 0
    constraints: Mapping[str, object] = field(default_factory=dict)
    question: str = ""
    regret: float = 0.01
    bootstraps: int = 40
    seed: int = 0
    _first: Weighed | None = field(default=None, init=False)
    _traces: dict[str, float] = field(default_factory=dict, init=False)

    @property
    def key(self) -> str:
        """What the answer depends on beside the traces: measurements that it ended are not those of other budgets."""
        of = [self.budget, self.selector, dict(self.constraints), self.question, self.regret, self.bootstraps]
        return " ".join(map(str, of))

    def __call__(self, measured: Sensitivity) -> bool:
        """Whether 95% of the redrawn traces agree with the present plan within the regret."""
        now, _ = guarded_mean_traces(measured)
        if self._first is None:
            self._first, self._traces = self.weigh(measured), dict(now)
        candidates = {name: tuple(self._scaled(name, c, now) for c in cs) for name, cs in self._first.items()}
        problem = Problem(self.table, candidates, measured, self.overhead, **self.constraints)  # type: ignore[arg-type]
        plan = select(problem, self.budget, self.selector)
        stability = bootstrap_stability(problem, plan, bootstraps=self.bootstraps, seed=self.seed)
        return stability.regret95 <= self.regret

    def _scaled(self, name: str, candidate: Candidate, now: Mapping[str, float]) -> Candidate:
        """The candidate with the Ω of the present trace; the score is then computed from it, by whatever rule."""
        if not math.isfinite(candidate.omega):  # not available, whatever the trace; infinity times 0 is no number
            return candidate
        before = self._traces[name]
        # a site without curvature until now: its perturbation times its trace is what there is to say
        omega = candidate.omega * now[name] / before if before > 0 else candidate.perturbation * now[name]
        return replace(candidate, omega=omega)
