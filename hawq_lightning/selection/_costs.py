"""What a plan costs: bytes, BOPs, activation memory, latency. Every cost is linear in one-hot choices.

A cost is a constant, a table by group of tied sites, and a table by coupled pair (weight group, activation group); the
peak of activation memory is the largest of several such rows, one a time step.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from hawq_lightning._code_formats import CODE_FORMATS
from hawq_lightning._errors import HawqError, nearest
from hawq_lightning.selection._constraints import FLOAT_BITS
from hawq_lightning.selection._frontier import Floats

if TYPE_CHECKING:
    from hawq_lightning.selection._problem import Problem

COSTS = ("weight_bytes", "file_bytes", "bops", "act_bytes", "act_peak_bytes", "latency_ms")


@dataclass(frozen=True)
class Linear:
    """One linear row.

    Attributes:
        constant: what every plan pays.
        unary: by group, ``[bits of the group]``.
        pairs: (weight group, activation group) -> ``[bits, bits]``; neither group has a single option.
    """

    constant: float
    unary: tuple[Floats, ...]
    pairs: dict[tuple[int, int], Floats]

    def change(self, choice: Sequence[int], group: int, to: int) -> float:
        """How much the cost grows when one group moves to position ``to``."""
        grown = float(self.unary[group][to] - self.unary[group][choice[group]])
        for (w, a), t in self.pairs.items():
            if group == w:
                grown += float(t[to, choice[a]] - t[choice[w], choice[a]])
            elif group == a:
                grown += float(t[choice[w], to] - t[choice[w], choice[a]])
        return grown

    def __call__(self, choice: Sequence[int]) -> float:
        """The cost of a choice, the position in its bits for every group."""
        parts = [self.constant, *(float(u[k]) for u, k in zip(self.unary, choice))]
        parts += [float(t[choice[w], choice[a]]) for (w, a), t in self.pairs.items()]
        return math.fsum(parts)


def linear(problem: Problem, name: str) -> tuple[Linear, ...]:
    """The rows of a cost; its value is the largest of them.

    Raises:
        HawqError: no such cost, or the problem lacks what it needs (latencies, time steps, activations).
    """
    if name in problem.extra_costs:
        table = problem.extra_costs[name]
        return (_by_site(problem, lambda i, b: table[i][b]),)
    if name == "weight_bytes":
        return (_by_site(problem, lambda i, b: problem.sites[i].numel * b / 8, "weight"),)
    if name == "file_bytes":
        formats = {(s.name, o.bits): CODE_FORMATS[o.code] for s in problem.sites for o in problem.options[s.name]}

        def stored(i: int, b: int) -> float:
            site = problem.sites[i]
            return math.ceil(site.numel * b / 8) + formats[site.name, b].storage_bytes(site.channels, b)

        return (_by_site(problem, stored, "weight", problem.file_overhead),)
    if name == "act_bytes":
        _need_activations(problem, name)
        return (_by_site(problem, lambda i, b: problem.sites[i].numel * b / 8, "activation"),)
    if name == "bops":
        if not any(layer.macs for layer in problem.layers):
            raise HawqError("BOPs need the layers' MACs: find the sites with an example batch.")
        macs = {layer.name: layer.macs for layer in problem.layers}
        return (_by_layer(problem, lambda layer, w, a: macs[layer] * w * a),)
    if name == "latency_ms":
        if problem.latency is None:
            raise HawqError("A latency budget needs a latency table: pass latency=<CSV of layer, weight_bits, ms>.")
        table_, shapes = problem.latency, {s.name: s.shape for s in problem.sites}
        layers = {layer.name: layer for layer in problem.layers}
        return (_by_layer(problem, lambda n, w, a: table_.ms(layers[n], shapes[layers[n].weight], w, a)),)
    if name == "act_peak_bytes":
        return _peak(problem)
    choices = [*COSTS, *problem.extra_costs]
    raise HawqError(f"There is no cost {name!r}; use one of {', '.join(choices)}.{nearest(name, choices)}")


def value(rows: Sequence[Linear], choice: Sequence[int]) -> float:
    """The cost of a choice: the largest row."""
    return max(row(choice) for row in rows)


def float_cost(problem: Problem, name: str) -> float:
    """The same cost at 32 bits everywhere: what ``x`` divides. Only the quantized sites count."""
    kind = {"weight_bytes": "weight", "act_bytes": "activation"}.get(name)
    if kind:
        return sum(s.numel for s in problem.sites if s.kind == kind) * FLOAT_BITS / 8
    if name == "bops":
        return float(sum(layer.macs for layer in problem.layers) * FLOAT_BITS**2)
    if name == "act_peak_bytes" and problem.steps:
        return max(sum(step.values()) for step in problem.steps) * FLOAT_BITS / 8
    if name == "file_bytes":
        return problem.file_overhead + sum(4.0 * s.numel for s in problem.sites if s.kind == "weight")
    raise HawqError(f"{name} has no float32 value to be times smaller than; give an absolute figure.")


def eight_bit_cost(problem: Problem, name: str) -> float:
    """The same cost with every weight and every activation at 8 bits: what ``%`` is of."""
    if name == "bops":
        return float(sum(layer.macs for layer in problem.layers) * 64)
    if name == "latency_ms" and problem.latency is not None:
        shapes = {s.name: s.shape for s in problem.sites}
        total = math.fsum(problem.latency.ms(x, shapes[x.weight], 8, 8) for x in problem.layers)
        if total < math.inf:
            return total
        raise HawqError("The latency table lacks 8-bit rows, so '%' has no meaning; give milliseconds.")
    if name == "act_peak_bytes" and problem.steps:  # what waits as float32 stays so
        return max(sum(live.values()) + 4 * held for live, held in _steps(problem))
    return float_cost(problem, name) / 4


def _need_activations(problem: Problem, name: str) -> None:
    if not any(s.kind == "activation" for s in problem.sites):
        raise HawqError(f"{name} needs activation sites; none is quantized here.")


def _by_site(problem, of, kind: str | None = None, constant: float = 0.0) -> Linear:  # type: ignore[no-untyped-def]
    unary = []
    for group in problem.groups:
        counts = kind is None or group.kind == kind
        unary.append(np.asarray([math.fsum(of(i, b) for i in group.members) if counts else 0.0 for b in group.bits]))
    return Linear(constant, tuple(unary), {})


def _by_layer(problem, of) -> Linear:  # type: ignore[no-untyped-def]
    unary = [np.zeros(len(g.bits)) for g in problem.groups]
    pairs: dict[tuple[int, int], Floats] = {}
    for layer, w, a in problem.readers:
        weight_bits = problem.groups[w].bits
        activation_bits = (FLOAT_BITS,) if a is None else problem.groups[a].bits
        table = np.asarray([[of(layer.name, x, y) for y in activation_bits] for x in weight_bits], dtype=np.float64)
        if np.isinf(table).all():
            raise HawqError(
                f"The device has no latency for layer {layer.name!r} at weights of "
                f"{', '.join(map(str, weight_bits))} bits with activations of {', '.join(map(str, activation_bits))}."
            )
        if table.shape[1] == 1:
            unary[w] += table[:, 0]
        elif table.shape[0] == 1 and a is not None:
            unary[a] += table[0]
        elif a is not None:
            pairs[w, a] = pairs.get((w, a), 0) + table
    return Linear(0.0, tuple(unary), pairs)


def _peak(problem: Problem) -> tuple[Linear, ...]:
    if not problem.steps:
        raise HawqError("Peak activation memory needs time steps: pass steps=activation_steps(model, batch).")
    index = {s.name: i for i, s in enumerate(problem.sites)}
    rows: dict[tuple[tuple[int, int], ...], float] = {}
    for live, waiting in _steps(problem):
        key = tuple(sorted((index[k], n) for k, n in live.items()))
        rows[key] = max(rows.get(key, 0.0), waiting * FLOAT_BITS / 8)
    out = []
    for key, held in rows.items():
        elements = dict(key)
        out.append(_by_site(problem, lambda i, b, e=elements: e.get(i, 0) * b / 8, "activation", held))
    return tuple(out)


def _steps(problem: Problem) -> Iterator[tuple[dict[str, int], int]]:
    """Of every time step the elements held at a site's bits, by site, and those held as float32."""
    quantized = {s.name for s in problem.sites if s.kind == "activation"}
    for step in problem.steps:
        live = {k: n for k, n in step.items() if k in quantized}
        yield live, sum(n for k, n in step.items() if k not in live)
