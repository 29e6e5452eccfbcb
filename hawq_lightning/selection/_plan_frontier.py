"""The frontier whose points are plans, and its table ``frontier.csv``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike

from hawq_lightning._csv import csv_text
from hawq_lightning._errors import HawqError
from hawq_lightning._io import write_text
from hawq_lightning._plan import Plan
from hawq_lightning.selection._costs import cost_rows
from hawq_lightning.selection._coupling import group_frontier
from hawq_lightning.selection._pareto import Floats, Ints
from hawq_lightning.selection._plans import make_plan
from hawq_lightning.selection._problem import Problem
from hawq_lightning.selection._sweep import Frontier

CSV_ROWS = 5000
More = Callable[["PlanFrontier", Ints], Mapping[str, Floats]]
"""From a frontier and points of it to named columns."""


@dataclass(frozen=True)
class PlanFrontier(Frontier):
    """A frontier whose points are plans of a problem; ``options(i)`` indexes each site's candidates.

    Attributes:
        problem: whose plans they are.
        cost_name: registered name of the cost.
    """

    problem: Problem
    cost_name: str

    def choices(self, points: ArrayLike | None = None) -> Ints:
        """``[points, groups]``: positions in the groups' bits at the given points, at all by default."""
        return super().table(points)

    def choice(self, i: int) -> list[int]:
        """Point ``i`` as a choice."""
        return [int(k) for k in self.choices([i])[0]]

    def bits(self, i: int) -> dict[str, int]:
        """Site name -> bits at point ``i``."""
        choice = self.choice(i)
        return {s.name: self._bits(choice, j) for j, s in enumerate(self.problem.sites)}

    def plan(self, i: int) -> Plan:
        """Point ``i`` as a plan."""
        return make_plan(self.problem, self.choice(i), selector="pareto")

    def table(self, points: ArrayLike | None = None) -> Ints:
        """``[points, sites]`` option indices of the given points, of all by default."""
        choices = self.choices(points)
        out = np.empty((len(choices), len(self.problem.sites)), dtype=np.int64)
        for j in range(len(self.problem.sites)):
            group = self.problem.group_of[j]
            where = [self.problem.best[j][b][0] for b in self.problem.groups[group].bits]
            out[:, j] = np.asarray(where)[choices[:, group]]
        return out

    def rows(self, max_rows: int | None = CSV_ROWS, more: More | None = None) -> list[dict[str, float]]:
        """One dict a point: cost, score, Ω (total, weights, activations), mean bits, compressions, bits of every site.

        Args:
            max_rows: longer frontiers are thinned evenly, ends kept; None: all points.
            more: further columns, such as :meth:`hawq_lightning.selection.Outlook.columns`.
        """
        count = len(self)
        at = np.arange(count)
        if max_rows is not None and count > max_rows:
            at = np.unique(np.linspace(0, count - 1, max_rows).round().astype(np.int64))
        choices, problem = self.choices(at), self.problem
        bits = np.stack([np.asarray(problem.groups[g].bits)[choices[:, g]] for g in problem.group_of], axis=1)
        omegas = {
            kind: sum(
                (g.omega[choices[:, j]] for j, g in enumerate(problem.groups) if g.kind == kind), np.zeros(len(at))
            )
            for kind in ("weight", "activation")
        }
        means = {}
        for kind in ("weight", "activation"):
            size = np.asarray([s.numel if s.kind == kind else 0 for s in problem.sites], dtype=np.float64)
            if size.any():
                means[kind] = bits @ size / size.sum()
        further = {} if more is None else more(self, at)
        out = []
        for k, i in enumerate(at):
            row: dict[str, float] = {
                self.cost_name: float(self.cost[i]),
                problem.score: float(self.omega[i]),
                "omega_weights": float(omegas["weight"][k]),
                "omega_activations": float(omegas["activation"][k]),
                "mean_weight_bits": float(means["weight"][k]),
                "w_comp": 32 / float(means["weight"][k]),
            }
            row.setdefault("omega", row["omega_weights"] + row["omega_activations"])
            if "activation" in means:
                row["mean_act_bits"] = float(means["activation"][k])
                row["a_comp"] = 32 / float(means["activation"][k])
            row |= {name: float(values[k]) for name, values in further.items()}
            row |= {s.name: int(b) for s, b in zip(problem.sites, bits[k])}
            out.append({"point": int(i)} | row)
        return out

    def to_csv(self, path: str | Path, max_rows: int | None = CSV_ROWS, more: More | None = None) -> None:
        """Write :meth:`rows`, atomically. The first columns are ``point`` and ``cost``.

        Args:
            path: of the file.
            max_rows: see :meth:`rows`.
            more: further columns.
        """
        listed = self.rows(max_rows, more)
        rows = [{("cost" if k == self.cost_name else k): v for k, v in row.items()} for row in listed]
        cells = ([f"{v:.10g}" if isinstance(v, float) else v for v in row.values()] for row in rows)
        write_text(path, csv_text(rows[0], cells, lineterminator="\r\n"))

    def _bits(self, choice: Sequence[int], site: int) -> int:
        group = self.problem.group_of[site]
        return self.problem.groups[group].bits[choice[group]]


def plan_frontier(problem: Problem, cost: str = "weight_bytes", scores: Sequence[Floats] | None = None) -> PlanFrontier:
    """Every plan that no other beats in Ω and one cost (paper section 2.3, Fig. 4).

    Args:
        problem: to choose from.
        cost: a registered cost, or one of the problem's own.
        scores: by group, ``[bits]``, to trade in the place of the problem's, which is Ω by default.

    Raises:
        HawqError: no such cost, one that is a maximum of several rows, or too much coupling.
    """
    rows = cost_rows(problem, cost)
    if len(rows) != 1:
        raise HawqError(f"{cost} is a maximum over time steps and has no frontier by this sweep; use it as a budget.")
    front = group_frontier(problem, rows[0], scores)
    return PlanFrontier(
        front.cost, front.omega, front.factor, front._blocks, front._stages, front._sites, problem, cost
    )
