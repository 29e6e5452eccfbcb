"""The selection problem: sites, their options, what ties them, what they cost. Numbers only; no model is needed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hawq_lightning._errors import HawqError, nearest
from hawq_lightning._plan import Candidate, Plan
from hawq_lightning._site_table import Layer, Site, SiteTable
from hawq_lightning.selection._checks import best_by_bits, check_sites, extra_cost
from hawq_lightning.selection._constraints import Pairs, Ties, device_masks, device_pairs, narrowed, tie_indices
from hawq_lightning.selection._costs import Linear, linear, value
from hawq_lightning.selection._frontier import MAX_POINTS, Floats, connected_groups
from hawq_lightning.selection._latency import LatencyTable
from hawq_lightning.sensitivity import Sensitivity, SiteTrace

if TYPE_CHECKING:
    from hawq_lightning.selection._plans import PlanFrontier


@dataclass(frozen=True)
class Group:
    """Sites of one kind that take the same bits: the unit of choice.

    Attributes:
        members: indices of the sites.
        kind: ``weight`` or ``activation``.
        bits: the widths it may take, ascending.
        omega: Ω at each of them, added up over the members.
    """

    members: tuple[int, ...]
    kind: str
    bits: tuple[int, ...]
    omega: Floats


class Problem:
    """Everything that a selector may ask for.

    Attributes:
        sites: the quantized sites, weights before activations.
        layers: what ties weights to activations, with MACs.
        groups: tied sites merged; a *choice* is a position in ``bits`` for every group.
        readers: (layer, weight group, activation group or None where the input stays float).
        masks: (weight group, activation group) -> the pairs that the device has; absent where all are.
    """

    def __init__(
        self,
        sites: SiteTable | Sequence[Site],
        options: Mapping[str, Sequence[Candidate]],
        sensitivity: Sensitivity | None = None,
        file_overhead: int = 0,
        *,
        ties: Ties = (),
        fixed: Mapping[str, int] | None = None,
        min_bits: int | Mapping[str, int] | None = None,
        pairs: Pairs | None = None,
        latency: LatencyTable | str | Path | None = None,
        steps: Sequence[Mapping[str, int]] | None = None,
        extra_costs: Mapping[str, Mapping[str, Mapping[int, float]]] | None = None,
        layers: Sequence[Layer] | None = None,
        max_points: int = MAX_POINTS,
    ) -> None:
        """Gather and check the numbers.

        Args:
            sites: of the model. An activation site without options stays float.
            options: site name -> what was weighed for it; of equal bits the one with the least Ω counts.
            sensitivity: the traces behind Ω; needed by the selectors that order sites by trace, and by the bootstrap.
            file_overhead: bytes of the packed file that no bit choice changes, scales and codes excluded.
            ties: lists (or a mapping name -> list) of site names, globs, or layer names (their weights).
            fixed: site name, glob, ``first`` or ``last`` -> bits.
            min_bits: least bits of every weight, or by site name or glob.
            pairs: (weight bits, activation bits) that the device has; for all layers, or by layer name, type or glob.
            latency: a table, or the path of its CSV.
            steps: elements alive at every time step, by activation site name; other names count as float32.
            extra_costs: cost name -> site name -> bits -> cost; a budget may bound them by a number.
            layers: taken from ``sites`` when it is a table.
            max_points: see :func:`hawq_lightning.selection.frontier`.

        Raises:
            HawqError: duplicate, unknown or empty sites; NaN or negative Ω; constraints that leave a site without bits.
        """
        table = tuple(sites)
        check_sites(table, options)
        self.sites = tuple(s for s in table if s.name in options)
        self.layers = tuple(layers if layers is not None else getattr(sites, "layers", ()))
        self.options = {s.name: tuple(options[s.name]) for s in self.sites}
        self.sensitivity = sensitivity
        self.file_overhead = int(file_overhead)
        self.latency = LatencyTable.load(latency) if isinstance(latency, (str, Path)) else latency
        self.steps = tuple(steps or ())
        self.max_points = max_points
        self.index = {s.name: i for i, s in enumerate(self.sites)}
        self.best = [best_by_bits(s, self.options[s.name]) for s in self.sites]
        self.extra_costs = {k: extra_cost(k, v, self.sites) for k, v in (extra_costs or {}).items()}
        allowed = narrowed([sorted(b) for b in self.best], self.sites, self.layers, fixed, min_bits)
        self._ties = connected_groups(len(self.sites), tie_indices(ties, self.sites, self.layers))
        bits = [self._common(members, allowed) for members in self._ties]
        group_of = {i: g for g, members in enumerate(self._ties) for i in members}
        self.group_of = [group_of[i] for i in range(len(self.sites))]
        for layer in self.layers:
            if layer.weight not in self.index:
                raise HawqError(f"Layer {layer.name!r} uses {layer.weight!r}, which is no site.")
        self.readers = [
            (
                x,
                group_of[self.index[x.weight]],
                group_of[self.index[x.activation]] if x.activation in self.index else None,
            )
            for x in self.layers
        ]
        self.masks = device_masks(bits, self.readers, device_pairs(pairs, self.layers))
        self.groups = [self._group(m, tuple(b)) for m, b in zip(self._ties, bits)]
        self._costs: dict[str, tuple[Linear, ...]] = {}

    @classmethod
    def from_arrays(
        cls,
        names: Sequence[str],
        bits: Sequence[int] | Sequence[Sequence[int]],
        omega: Any,
        numel: Sequence[int],
        *,
        mean_trace: Sequence[float] | None = None,
        perturbation: Any = None,
        **constraints: Any,
    ) -> Problem:
        """A problem of weights only, from numbers made anywhere.

        Args:
            names: of the sites.
            bits: the widths that the columns of ``omega`` stand for, the same for all sites or one list a site.
            omega: sites x options; ``inf`` is not available.
            numel: elements of each site.
            mean_trace: by site, for the selectors that order by it.
            perturbation: sites x options ``||Q(W) - W||^2``, for the selectors that use it.
            constraints: ``ties``, ``fixed``, ``extra_costs`` and the other keywords of :class:`Problem`.

        Raises:
            HawqError: lengths that differ, or what :class:`Problem` refuses.
        """
        count = len(names)
        rows = [[float(x) for x in row] for row in omega]
        widths = [[int(b) for b in row] if isinstance(row, Sequence) else [] for row in bits]
        if not any(widths):  # one list for all
            widths = [[int(b) for b in bits]] * count  # type: ignore[arg-type]
        given = {"bits": len(widths), "omega": len(rows), "numel": len(numel)}
        if mean_trace is not None:
            given["mean_trace"] = len(mean_trace)
        for what, length in given.items():
            if length != count:
                raise HawqError(f"There are {count} names but {length} rows of {what}.")
        options: dict[str, list[Candidate]] = {}
        for i, name in enumerate(names):
            if len(widths[i]) != len(rows[i]):
                raise HawqError(f"Site {name!r} has {len(widths[i])} widths but {len(rows[i])} values of omega.")
            moved = [0.0] * len(rows[i]) if perturbation is None else [float(x) for x in perturbation[i]]
            options[name] = [
                Candidate(int(b), "midrise" if b == 1 else "affine", w, p) for b, w, p in zip(widths[i], rows[i], moved)
            ]
        sites = [Site(n, "weight", (n,), (int(k),), int(k), 0) for n, k in zip(names, numel)]
        measured = None
        if mean_trace is not None:
            measured = Sensitivity(
                tuple(
                    SiteTrace(n, "weight", float(t) * int(k), 0.0, 0.0, int(k), float(t))
                    for n, t, k in zip(names, mean_trace, numel)
                )
            )
        return cls(sites, options, measured, **constraints)

    def cost(self, name: str) -> tuple[Linear, ...]:
        """The rows of a cost (see :mod:`hawq_lightning.selection.costs`)."""
        if name not in self._costs:
            self._costs[name] = linear(self, name)
        return self._costs[name]

    def cost_of(self, name: str, choice: Sequence[int]) -> float:
        """What a choice costs, in the unit that the cost's name says."""
        return value(self.cost(name), choice)

    def omega_of(self, choice: Sequence[int]) -> float:
        """Total Ω of a choice, weights and activations."""
        return math.fsum(float(g.omega[k]) for g, k in zip(self.groups, choice))

    def scores(self) -> list[Floats]:
        """Ω by group: what the selectors minimise."""
        return [g.omega for g in self.groups]

    def mean_traces(self) -> list[float]:
        """Mean trace by group, Σ trace / Σ elements over tied sites.

        Raises:
            HawqError: no sensitivity was given, or it lacks a site that has a choice.
        """
        if self.sensitivity is None:
            raise HawqError("This selector orders sites by mean trace: give the problem its sensitivity.")
        traces = {r.name: r.mean_trace for r in self.sensitivity}
        out = []
        for group in self.groups:
            members = [self.sites[i] for i in group.members]
            missing = [s.name for s in members if s.name not in traces]
            if missing and len(group.bits) > 1:
                raise HawqError(f"No trace was measured for {missing[0]!r}.{nearest(missing[0], traces)}")
            total = math.fsum(traces.get(s.name, 0.0) * s.numel for s in members)
            out.append(total / sum(s.numel for s in members))
        return out

    def choice_of(self, bits: Mapping[str, int]) -> list[int]:
        """The choice that gives every site the bits asked for.

        Raises:
            HawqError: sites that are missing, unknown or tied to different bits; bits or pairs that are not allowed.
        """
        for name in bits:
            if name not in self.index:
                raise HawqError(f"No site is called {name!r}.{nearest(str(name), self.index)}")
        choice = []
        for group in self.groups:
            names = [self.sites[i].name for i in group.members]
            wanted = {n: bits[n] for n in names if n in bits}
            if not wanted and len(group.bits) > 1:
                raise HawqError(f"No bits are given for site {names[0]!r}.")
            if len(set(wanted.values())) > 1:
                raise HawqError(
                    "Tied sites must have the same bits: " + ", ".join(f"{n} {b}" for n, b in wanted.items()) + "."
                )
            width = next(iter(wanted.values()), group.bits[0])
            if isinstance(width, bool) or not isinstance(width, int):
                raise HawqError(f"Site {names[0]!r} cannot have {width!r} bits; give a whole number.")
            if width not in group.bits:
                close = min(group.bits, key=lambda b: abs(b - width))
                shown = ", ".join(map(str, group.bits))
                raise HawqError(f"Site {names[0]!r} cannot have {width} bits; it has {shown}; the nearest is {close}.")
            choice.append(group.bits.index(width))
        self.check_pairs(choice)
        return choice

    def check_pairs(self, choice: Sequence[int]) -> None:
        """Raise HawqError when a layer's pair of bits does not exist on the device."""
        for (w, a), mask in self.masks.items():
            if not mask[choice[w], choice[a]]:
                layer = next(x for x, i, j in self.readers if (i, j) == (w, a))
                pair = (self.groups[w].bits[choice[w]], self.groups[a].bits[choice[a]])
                raise HawqError(
                    f"The device lacks weights of {pair[0]} bits with activations of {pair[1]} for {layer.name!r}."
                )

    def pairs_fit(self, choice: Sequence[int]) -> bool:
        """Whether every layer's pair of bits exists on the device."""
        return all(mask[choice[w], choice[a]] for (w, a), mask in self.masks.items())

    def frontier(self, cost: str = "weight_bytes") -> PlanFrontier:
        """Every plan that no other beats in Ω and this cost (Fig. 4)."""
        from hawq_lightning.selection._plans import plan_frontier

        return plan_frontier(self, cost)

    def uniform_points(self, cost: str = "weight_bytes") -> list[tuple[int, float, float]]:
        """``(bits, cost, Ω)`` of the plans with the same weight bits everywhere (fixed sites keep theirs)."""
        from hawq_lightning.selection._selectors import uniform_choice

        widths = sorted({b for g in self.groups if g.kind == "weight" for b in g.bits})
        found = ((b, uniform_choice(self, b, None)) for b in widths)
        return [(b, self.cost_of(cost, c), self.omega_of(c)) for b, c in found if c is not None]

    def recost(self, plan: Plan) -> Plan:
        """Check a plan that was edited by hand against this problem, and fill in what follows from its bits."""
        from hawq_lightning.selection._plans import make_plan

        extra = {"selector": plan.selector, "budget": plan.budget, "settings": dict(plan.settings)}
        out = make_plan(self, self.choice_of(plan.bits), codes={s.name: s.code for s in plan.sites}, **extra)
        return out.replace(quantizer=plan.quantizer, quantizer_options=plan.quantizer_options)

    def scaled(self, factors: Mapping[str, float]) -> Problem:
        """The same problem with the Ω of some sites multiplied (as the bootstrap does)."""
        other = object.__new__(Problem)
        other.__dict__ |= self.__dict__
        other.best = [
            {b: (j, o * factors.get(s.name, 1.0)) for b, (j, o) in best.items()}
            for s, best in zip(self.sites, self.best)
        ]
        other.groups = [other._group(g.members, g.bits) for g in self.groups]
        return other

    def _group(self, members: Sequence[int], bits: tuple[int, ...]) -> Group:
        omega = np.asarray([math.fsum(self.best[i][b][1] for i in members) for b in bits])
        return Group(tuple(members), self.sites[members[0]].kind, bits, omega)

    def _common(self, members: Sequence[int], allowed: Sequence[Sequence[int]]) -> list[int]:
        common = [b for b in allowed[members[0]] if all(b in allowed[i] for i in members)]
        if not common:
            shown = "; ".join(f"{self.sites[i].name} {', '.join(map(str, allowed[i]))}" for i in members[:4])
            raise HawqError(f"These tied sites conflict, they have no bits in common: {shown}.")
        return common
