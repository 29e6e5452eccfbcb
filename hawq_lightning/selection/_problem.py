"""The selection problem: sites, their candidates, what ties them. Numbers only; no model is needed.

Costs, plans, frontiers and selectors are functions of it, in files of their own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hawq_lightning._errors import HawqError, nearest
from hawq_lightning._plan import Candidate
from hawq_lightning._site_table import ActivationProduct, Layer, Site, SiteTable
from hawq_lightning.selection._arrays import parts_from_arrays
from hawq_lightning.selection._checks import best_by_bits, check_sites, cost_table
from hawq_lightning.selection._constraints import Pairs, Ties
from hawq_lightning.selection._groups import Group, Structure, structure_of
from hawq_lightning.selection._latency import LatencyTable
from hawq_lightning.selection._pareto import MAX_POINTS, Floats
from hawq_lightning.selection._scaled import scaled_candidates, scaled_traces
from hawq_lightning.selection._scores import DEFAULT_SCORE, SCORES
from hawq_lightning.sensitivity import Sensitivity, guarded_mean_traces


@dataclass(frozen=True, eq=False)
class Problem:
    """Everything that a selector may ask for. Checked when made.

    Raises:
        HawqError: duplicate, unknown or empty sites; NaN or negative Ω; constraints that leave a site without bits.
    """

    table: SiteTable | Sequence[Site]
    """Sites of the model, weights before activations. An activation site without candidates stays float."""
    candidates: Mapping[str, Sequence[Candidate]]
    """Site name -> what was weighed for it; of equal bits the one with the least score counts. Of
    :class:`hawq_lightning.Candidates` plans take the quantizer; of another mapping it is ``uniform``."""
    sensitivity: Sensitivity | None = None
    """The traces behind Ω: for selectors that order sites by trace, scores that need traces, and the bootstrap."""
    file_overhead: int = 0
    """Bytes of the packed file that no bit choice changes, scales and codes excluded."""
    ties: Ties = field(default=(), kw_only=True)
    """Lists (or a mapping name -> list) of site names, globs, or layer names (their weights)."""
    fixed: Mapping[str, int] | None = field(default=None, kw_only=True)
    """Site name, glob, ``first`` or ``last`` -> bits."""
    min_bits: int | Mapping[str, int] | None = field(default=None, kw_only=True)
    """Least bits of every weight, or by site name or glob."""
    pairs: Pairs | None = field(default=None, kw_only=True)
    """(weight bits, activation bits) that the device has; for all layers, or by layer name, type or glob."""
    latency: LatencyTable | str | Path | None = field(default=None, kw_only=True)
    """Milliseconds a layer and width: a table, or the path of its CSV."""
    steps: Sequence[Mapping[str, int]] = field(default=(), kw_only=True)
    """Elements alive at every time step, by activation site name; other names count as float32."""
    tables: Mapping[str, object] = field(default_factory=dict, kw_only=True)
    """Cost name -> what a registered cost of the user's own needs beside sites and layers."""
    extra_costs: Mapping[str, Mapping[str, Mapping[int, float]]] | None = field(default=None, kw_only=True)
    """Cost name -> site name -> bits -> cost; a budget may bound them by a number."""
    score: str = field(default=DEFAULT_SCORE, kw_only=True)
    """Registered name of what selection minimises."""
    max_points: int = field(default=MAX_POINTS, kw_only=True)
    """See :func:`hawq_lightning.selection.frontier`."""

    def __post_init__(self) -> None:
        check_sites(tuple(self.table), self.candidates)
        SCORES.check(self.score)
        _ = self.latency_table, self.best, self.extra_tables, self.groups  # bad numbers are refused now, not later

    @classmethod
    def from_arrays(
        cls,
        names: Sequence[str],
        bits: Sequence[int] | Sequence[Sequence[int]],
        omega: Sequence[Sequence[float]] | Floats,
        numel: Sequence[int],
        *,
        mean_trace: Sequence[float] | None = None,
        perturbation: Sequence[Sequence[float]] | Floats | None = None,
        layers: Sequence[Layer] = (),
        **constraints: object,
    ) -> Problem:
        """A problem of weights only, from numbers made anywhere.

        Args:
            names: of the sites.
            bits: the widths that the columns of ``omega`` stand for, the same for all sites or one list a site.
            omega: sites x widths; ``inf`` is not available.
            numel: elements of each site.
            mean_trace: by site, for the selectors that order by it.
            perturbation: sites x widths ``||Q(W) - W||^2``, for the selectors that use it.
            layers: for costs by layer, such as latencies.
            constraints: ``ties``, ``fixed``, ``extra_costs`` and the other keywords of :class:`Problem`.

        Raises:
            HawqError: lengths that differ, or what :class:`Problem` refuses.
        """
        sites, candidates, sensitivity = parts_from_arrays(names, bits, omega, numel, mean_trace, perturbation)
        return cls(SiteTable(sites, tuple(layers)), candidates, sensitivity, **constraints)  # type: ignore[arg-type]

    @cached_property
    def sites(self) -> tuple[Site, ...]:
        """The quantized sites, weights before activations."""
        return tuple(s for s in self.table if s.name in self.candidates)

    @cached_property
    def layers(self) -> tuple[Layer, ...]:
        """What ties weights to activations, with multiply-accumulates."""
        return self.table.layers if isinstance(self.table, SiteTable) else ()

    @cached_property
    def products(self) -> tuple[ActivationProduct, ...]:
        """Of attention, with multiply-accumulates."""
        return self.table.products if isinstance(self.table, SiteTable) else ()

    @property
    def biases(self) -> Mapping[str, str]:
        """Layers whose biases are INT32 -> the BatchNorm that each takes in, or nothing."""
        return self.table.biases if isinstance(self.table, SiteTable) else {}

    @cached_property
    def first_to_last(self) -> tuple[Layer, ...]:
        """:attr:`layers`, the network's last one at the end: what ``first`` and ``last`` mean."""
        return self.table.first_to_last if isinstance(self.table, SiteTable) else ()

    @property
    def float_bytes(self) -> int | None:
        """Bytes of the model that are no site's weight, at their own type; ``None``: not known."""
        return self.table.float_bytes if isinstance(self.table, SiteTable) else None

    @property
    def float_rest(self) -> int | None:
        """:attr:`float_bytes` with floats counted as float32; ``None``: not known."""
        return self.table.float_rest if isinstance(self.table, SiteTable) else None

    @cached_property
    def index(self) -> dict[str, int]:
        """Site name -> position in :attr:`sites`."""
        return {s.name: i for i, s in enumerate(self.sites)}

    @cached_property
    def latency_table(self) -> LatencyTable | None:
        """:attr:`latency`, read from its file where it is a path."""
        return LatencyTable.load(self.latency) if isinstance(self.latency, (str, Path)) else self.latency

    @cached_property
    def best(self) -> list[dict[int, tuple[int, float]]]:
        """By site: bits -> (index of the candidate with the least score, that score)."""
        score, traces = SCORES[self.score], self._traces_for_score()
        return [
            best_by_bits(
                s, self.candidates[s.name],
                lambda c, s=s: score.of(s, c, traces.get(s.name, math.nan)),  # type: ignore[misc]
                score.symbol,
            )
            for s in self.sites
        ]  # fmt: skip

    @cached_property
    def extra_tables(self) -> dict[str, list[Mapping[int, float]]]:
        """Cost name -> by site, bits -> cost."""
        return {k: cost_table(k, v, self.sites) for k, v in (self.extra_costs or {}).items()}

    @cached_property
    def groups(self) -> tuple[Group, ...]:
        """Tied sites merged; a *choice* is a position in ``bits`` for every group."""
        return tuple(self._group(m, tuple(b)) for m, b in zip(self._structure.members, self._structure.bits))

    @cached_property
    def group_of(self) -> list[int]:
        """By site, the position of its group."""
        group_of = {i: g for g, members in enumerate(self._structure.members) for i in members}
        return [group_of[i] for i in range(len(self.sites))]

    @property
    def layer_groups(self) -> list[tuple[Layer, int, int | None]]:
        """(layer, weight group, activation group or None where the input stays float)."""
        return self._structure.layer_groups

    @property
    def allowed_pairs(self) -> dict[tuple[int, int], NDArray[np.bool_]]:
        """(weight group, activation group) -> the pairs of bits that the device has; absent where it has all."""
        return self._structure.allowed_pairs

    def omega_of(self, choice: Sequence[int]) -> float:
        """Total Ω of a choice, weights and activations."""
        return math.fsum(float(g.omega[k]) for g, k in zip(self.groups, choice))

    def score_of(self, choice: Sequence[int]) -> float:
        """Total of what selection minimises; Ω by default."""
        return math.fsum(float(g.score[k]) for g, k in zip(self.groups, choice))

    def scores(self) -> list[Floats]:
        """By group, ``[bits]``: what selection minimises."""
        return [g.score for g in self.groups]

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
        """The choice that gives every site these bits.

        Raises:
            HawqError: sites that are missing, unknown or tied to different bits; bits or pairs that are not allowed.
        """
        for name in bits:
            if name not in self.index:
                raise HawqError(f"No site is called {name!r}.{nearest(str(name), self.index)}")
        choice = []
        for group in self.groups:
            names = [self.sites[i].name for i in group.members]
            given = {n: bits[n] for n in names if n in bits}
            if not given and len(group.bits) > 1:
                raise HawqError(f"No bits are given for site {names[0]!r}.")
            if len(set(given.values())) > 1:
                listed = ", ".join(f"{n} {b}" for n, b in given.items())
                raise HawqError(f"Tied sites must have the same bits: {listed}.")
            width = next(iter(given.values()), group.bits[0])
            if isinstance(width, bool) or not isinstance(width, int):
                raise HawqError(f"Site {names[0]!r} cannot have {width!r} bits; give a whole number.")
            if width not in group.bits:
                close = min(group.bits, key=lambda b: abs(b - width))
                widths = ", ".join(map(str, group.bits))
                raise HawqError(f"Site {names[0]!r} cannot have {width} bits; it has {widths}; the nearest is {close}.")
            choice.append(group.bits.index(width))
        self.check_pairs(choice)
        return choice

    def check_pairs(self, choice: Sequence[int]) -> None:
        """Raise HawqError when a layer's pair of bits does not exist on the device."""
        for (w, a), allowed in self.allowed_pairs.items():
            if not allowed[choice[w], choice[a]]:
                layer = next(x for x, i, j in self.layer_groups if (i, j) == (w, a))
                pair = (self.groups[w].bits[choice[w]], self.groups[a].bits[choice[a]])
                raise HawqError(
                    f"The device lacks weights of {pair[0]} bits with activations of {pair[1]} for {layer.name!r}."
                )

    def pairs_fit(self, choice: Sequence[int]) -> bool:
        """Whether every layer's pair of bits exists on the device."""
        return all(allowed[choice[w], choice[a]] for (w, a), allowed in self.allowed_pairs.items())

    def redrawn(self, factors: Mapping[str, float]) -> Problem:
        """The same problem had the traces of some sites been larger or smaller, as the bootstrap draws them.

        Args:
            factors: site name -> trace drawn / trace measured. Ω of a candidate is linear in it by definition.
        """
        return replace(
            self, candidates=scaled_candidates(self.candidates, factors),
            sensitivity=None if self.sensitivity is None else scaled_traces(self.sensitivity, factors),
        )  # fmt: skip

    def _traces_for_score(self) -> Mapping[str, float]:
        if "traces" not in SCORES[self.score].needs:
            return {}
        if self.sensitivity is None:
            raise HawqError(f"The score {self.score!r} needs traces: give the problem its sensitivity.")
        traces, _ = guarded_mean_traces(self.sensitivity)
        if missing := [s.name for s in self.sites if s.name not in traces]:
            raise HawqError(f"No trace was measured for {missing[0]!r}.{nearest(missing[0], traces)}")
        return traces

    @cached_property
    def _structure(self) -> Structure:
        widths = [sorted(b) for b in self.best]
        return structure_of(
            self.sites, self.layers, self.first_to_last, widths,
            ties=self.ties, fixed=self.fixed, min_bits=self.min_bits, pairs=self.pairs,
        )  # fmt: skip

    def _group(self, members: Sequence[int], bits: tuple[int, ...]) -> Group:
        score = np.asarray([math.fsum(self.best[i][b][1] for i in members) for b in bits])
        omega = np.asarray([math.fsum(self._best(i, b).omega for i in members) for b in bits])
        return Group(tuple(members), self.sites[members[0]].kind, bits, score, omega)

    def _best(self, site: int, bits: int) -> Candidate:
        return self.candidates[self.sites[site].name][self.best[site][bits][0]]
