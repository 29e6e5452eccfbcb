"""What a cost is: its words and units, its numbers, and what ``x`` and ``%`` mean.

A cost of the user's own is one class in a file of the user's own.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal

import numpy as np

from hawq_lightning._errors import HawqError
from hawq_lightning._site_table import Layer, Site
from hawq_lightning.selection._constraints import FLOAT_BITS
from hawq_lightning.selection._linear_cost import LinearCost
from hawq_lightning.selection._pareto import Floats
from hawq_lightning.selection._problem import Problem
from hawq_lightning.selection._units import Unit

Form = Literal["x", "%", "bit"]


class Cost(ABC):
    """One kind of cost, >= 0, the largest of some functions that are linear in the choice of bits.

    Attributes:
        name: as registered; with its unit, as it stands in plans.
        words: what a budget may call it, beside its name.
        title: what a report calls it.
        unit: suffixes of budgets, and how figures are shown.
        forms: relative forms that a budget may take: ``x`` times smaller than :meth:`float32`, ``%`` of
            :meth:`eight_bit`, mean ``bit`` (of 32 that :meth:`float32` has).
        shown_as: the relative form that goes with a figure; empty: none.
        bare: suffixes of a budget that is mere text, such as ``"12x"``, and then means this cost.
        examples: budgets in messages.
        table: what it needs beside sites and layers: ``latency``, ``steps`` or a key of :attr:`Problem.tables`.
        asked_for: plans show it only where a budget names it or :attr:`Problem.tables` has one for it.
    """

    name: str = ""
    words: ClassVar[tuple[str, ...]] = ()
    title: ClassVar[str] = ""
    unit: ClassVar[Unit] = Unit()
    forms: ClassVar[tuple[Form, ...]] = ()
    shown_as: ClassVar[Literal["x", "%", ""]] = ""
    bare: ClassVar[tuple[str, ...]] = ()
    examples: ClassVar[tuple[str, ...]] = ("a number",)
    table: ClassVar[str] = ""
    asked_for: ClassVar[bool] = False

    def is_asked_for(self, problem: Problem, budget: object) -> bool:
        """Whether a plan shows it."""
        named = {self.name, *self.words}
        return (
            not self.asked_for
            or bool(named & set(problem.tables))
            or (isinstance(budget, Mapping) and not named.isdisjoint(budget))
        )

    @abstractmethod
    def rows(self, problem: Problem) -> tuple[LinearCost, ...]:
        """The linear functions whose largest is the cost."""

    def missing(self, problem: Problem) -> str:
        """What the problem lacks to know this cost, as a sentence; empty: nothing."""
        return self.without_table if self.table and not table_of(problem, self.table) else ""

    @property
    def without_table(self) -> str:
        """The sentence that asks for the table."""
        return f"The cost {self.name!r} needs a table: give tables={{{self.table!r}: ...}}."

    def float32(self, problem: Problem) -> float:
        """The cost at 32 bits everywhere, of the quantized sites: what ``x`` divides.

        Raises:
            HawqError: it has no such value.
        """
        raise HawqError(f"{self.name} has no float32 value to be times smaller than; give an absolute figure.")

    def eight_bit(self, problem: Problem) -> float:
        """The cost with every weight and every activation at 8 bits: what ``%`` is of.

        Raises:
            HawqError: it has no such value.
        """
        return self.float32(problem) / 4

    def figures(self, problem: Problem, cost: float) -> dict[str, float]:
        """Further figures for a plan's costs, such as compressions."""
        return {}

    def format(self, problem: Problem, cost: float) -> str:
        """The cost as budgets write it, rounded up; with its relative form."""
        text = self.unit.format(cost)
        if self.shown_as == "x":
            return f"{text} = {math.floor(100 * self.float32(problem) / cost) / 100:g}x"
        if self.shown_as == "%":
            return f"{text} = {Unit().format(100 * cost / self.eight_bit(problem))}%"
        return text


class SiteCost(Cost):
    """A cost that adds up over sites.

    Attributes:
        kind: only ``weight`` or only ``activation`` sites count; empty: both.
    """

    kind: ClassVar[Literal["weight", "activation", ""]] = ""

    @abstractmethod
    def of(self, problem: Problem, site: Site, bits: int) -> float:
        """The cost of one site at some bits; ``inf``: not available.

        Args:
            problem: for what else the cost depends on.
            site: with its number of elements.
            bits: 1 to 8, or 32.
        """

    def constant(self, problem: Problem) -> float:
        """What every plan costs."""
        return 0.0

    def rows(self, problem: Problem) -> tuple[LinearCost, ...]:
        """One row, without couplings."""
        by_bits = lambda site, bits: self.of(problem, site, bits)  # noqa: E731
        return (site_row(problem, by_bits, self.kind, self.constant(problem)),)

    def float32(self, problem: Problem) -> float:
        """The sum with every site at 32 bits."""
        return self._total(problem, FLOAT_BITS)

    def eight_bit(self, problem: Problem) -> float:
        """The sum with every site at 8 bits."""
        return self._total(problem, 8)

    def _total(self, problem: Problem, bits: int) -> float:
        sites = [s for s in problem.sites if self.kind in ("", s.kind)]
        return self.constant(problem) + math.fsum(self.of(problem, s, bits) for s in sites)


class LayerCost(Cost):
    """A cost that adds up over layers and depends on both the weight's and the activation's bits."""

    @abstractmethod
    def of(self, problem: Problem, layer: Layer, weight_bits: int, activation_bits: int) -> float:
        """The cost of one layer at a pair of bits; ``inf``: the device does not have it.

        Args:
            problem: for what else the cost depends on, see :func:`table_of`.
            layer: with its multiply-accumulates.
            weight_bits: 1 to 8, or 32.
            activation_bits: 2 to 8, or 32 where the input stays float.
        """

    def rows(self, problem: Problem) -> tuple[LinearCost, ...]:
        """One row; layers whose weight and activation both have a choice couple them."""
        unary = [np.zeros(len(g.bits)) for g in problem.groups]
        pairs: dict[tuple[int, int], Floats] = {}
        for layer, w, a in problem.layer_groups:
            weight_bits = problem.groups[w].bits
            activation_bits = (FLOAT_BITS,) if a is None else problem.groups[a].bits
            costs = [[self.of(problem, layer, x, y) for y in activation_bits] for x in weight_bits]
            table = np.asarray(costs, dtype=np.float64)
            if np.isinf(table).all():
                have = [", ".join(map(str, bits)) for bits in (weight_bits, activation_bits)]
                raise HawqError(
                    f"The device has no {self.noun} for layer {layer.name!r} at weights of {have[0]} bits with "
                    f"activations of {have[1]}."
                )
            if table.shape[1] == 1:
                unary[w] += table[:, 0]
            elif table.shape[0] == 1 and a is not None:
                unary[a] += table[0]
            elif a is not None:
                pairs[w, a] = pairs.get((w, a), 0) + table
        return (LinearCost(0.0, tuple(unary), pairs),)

    @property
    def noun(self) -> str:
        """What messages call it."""
        return self.words[0] if self.words else self.name

    def float32(self, problem: Problem) -> float:
        """The sum with every layer at 32 bits."""
        return self._total(problem, FLOAT_BITS)

    def eight_bit(self, problem: Problem) -> float:
        """The sum with every layer at 8 bits.

        Raises:
            HawqError: the device lacks 8 bits somewhere.
        """
        total = self._total(problem, 8)
        if math.isinf(total):
            raise HawqError(f"The {self.noun} table lacks 8-bit rows, so '%' has no meaning; give an absolute figure.")
        return total

    def _total(self, problem: Problem, bits: int) -> float:
        return math.fsum(self.of(problem, layer, bits, bits) for layer in problem.layers)


class TableCost(SiteCost):
    """A cost of :attr:`Problem.extra_costs`: a table for one problem, without an entry in the registry."""

    def __init__(self, name: str) -> None:
        self.name = name

    def of(self, problem: Problem, site: Site, bits: int) -> float:
        """As the table says."""
        return problem.extra_tables[self.name][problem.index[site.name]][bits]


def table_of(problem: Problem, name: str) -> Any:
    """What a cost needs beside sites and layers: latencies, time steps, or an entry of :attr:`Problem.tables`."""
    tables: Mapping[str, object] = {"latency": problem.latency_table, "steps": problem.steps, **problem.tables}
    return tables.get(name)


def site_row(problem: Problem, of: Callable[[Site, int], float], kind: str = "", constant: float = 0.0) -> LinearCost:
    """A row from the costs of sites.

    Args:
        problem: its groups.
        of: site, bits -> cost.
        kind: only ``weight`` or only ``activation`` sites count; empty: both.
        constant: what every plan costs.
    """
    unary = []
    for group in problem.groups:
        counts = kind in ("", group.kind)
        members = [problem.sites[i] for i in group.members] if counts else []
        unary.append(np.asarray([math.fsum(of(s, b) for s in members) for b in group.bits]))
    return LinearCost(constant, tuple(unary), {})
