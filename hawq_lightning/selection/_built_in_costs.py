"""The costs of the paper and of devices: weights, file, BOPs, activations, their peak, latency."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from typing import ClassVar

import numpy as np

from hawq_lightning._code_formats import CODE_FORMATS, code_bytes
from hawq_lightning._errors import HawqError
from hawq_lightning._site_table import ActivationProduct, Layer, Site
from hawq_lightning.selection._constraints import FLOAT_BITS
from hawq_lightning.selection._cost import LayerCost, SiteCost, site_row, table_of
from hawq_lightning.selection._costs import register_cost
from hawq_lightning.selection._latency import LatencyTable
from hawq_lightning.selection._linear_cost import LinearCost
from hawq_lightning.selection._problem import Problem
from hawq_lightning.selection._units import BIT_OPERATIONS, BYTES, MILLISECONDS


def code_of(problem: Problem, site: Site, bits: int) -> str:
    """The code format of a site's candidate; ``affine`` where it has none of these bits."""
    return next((c.code for c in problem.candidates[site.name] if c.bits == bits), "affine")


def _alive(problem: Problem, elements: Mapping[str, int]) -> Callable[[Site, int], float]:
    """What a site takes at a time step, of so many elements that are alive then."""
    return lambda site, bits: code_bytes(elements.get(site.name, 0), bits, code_of(problem, site, bits))


def _elements(problem: Problem, kind: str) -> int:
    return sum(s.numel for s in problem.sites if s.kind == kind)


@register_cost("weight_bytes")
class WeightBytes(SiteCost):
    """Codes of the quantized weights: the paper's size, and its W-Comp (Tables 1 and 2)."""

    kind, words, title = "weight", ("weights",), "weights, codes (W-Comp)"
    unit, forms, shown_as, bare = BYTES, ("x", "%", "bit"), "x", ("x", "bit", "bits")
    examples = ('"12x"', '"3.5bit"', '"8MiB"')

    def of(self, problem: Problem, site: Site, bits: int) -> float:
        """Bits of the codes / 8, without padding, and what the format keeps at full precision."""
        return code_bytes(site.numel, bits, code_of(problem, site, bits))

    def figures(self, problem: Problem, cost: float) -> dict[str, float]:
        """Size at float32, mean bits, W-Comp."""
        elements = _elements(problem, "weight")
        return {
            "float_weight_bytes": 4.0 * elements, "mean_weight_bits": 8 * cost / elements,
            "w_comp": 4.0 * elements / cost,
        }  # fmt: skip


class StoredBytes(SiteCost):
    """Base of costs that count a site as it is stored."""

    kind, unit = "weight", BYTES

    def of(self, problem: Problem, site: Site, bits: int) -> float:
        """Whole bytes, and the scales or whatever else the code format stores."""
        code = code_of(problem, site, bits)
        return math.ceil(code_bytes(site.numel, bits, code)) + CODE_FORMATS[code].storage_bytes(site.channels, bits)


@register_cost("file_bytes")
class FileBytes(StoredBytes):
    """The whole packed file: codes, each site padded to whole bytes, scales, code books and what no choice changes."""

    words, title = ("file",), "packed file, all included"
    forms, bare, examples = ("x",), tuple(BYTES.suffixes), ('"8MB"', '"8MiB"')

    def constant(self, problem: Problem) -> float:
        """Header, float tensors, activations' grids."""
        return problem.file_overhead

    def float32(self, problem: Problem) -> float:
        """Every float tensor as float32; without scales, which float weights do not have."""
        wider = (problem.float_rest or 0) - (problem.float_bytes or 0)
        return problem.file_overhead + wider + 4.0 * _elements(problem, "weight")

    def figures(self, problem: Problem, cost: float) -> dict[str, float]:
        """What :func:`hawq_lightning.selection.recost` needs to predict the file again."""
        scales = sum(s.channels for s in problem.sites if s.kind == "weight")
        return {"file_overhead": float(problem.file_overhead), "weight_scales": float(scales)}

    def format(self, problem: Problem, cost: float) -> str:
        """In MB and MiB: budgets have both."""
        text = self.unit.format(cost)
        return text if cost < 1000 else f"{self.unit.format(cost, ('MB', 'kB'))} = {text}"


class OperationCost(LayerCost):
    """A cost of multiply-accumulates, of layers and of attention's products, which have no weight.

    Attributes:
        short: what messages call it, in the plural.
    """

    short: ClassVar[str]

    @abstractmethod
    def of_product(self, problem: Problem, product: ActivationProduct, left_bits: int, right_bits: int) -> float:
        """The cost of a product of two activations; 32: a factor that stays float."""

    def missing(self, problem: Problem) -> str:
        """MACs."""
        has_macs = any(layer.macs for layer in problem.layers)
        return (
            "" if has_macs else f"{self.title.capitalize()}: its layers have no MACs; find sites with an example batch."
        )

    def rows(self, problem: Problem) -> tuple[LinearCost, ...]:
        """One row; products of attention couple the two activations that they read."""
        (row,) = super().rows(problem)
        unary, pairs = [*row.unary], dict(row.pairs)
        for product in problem.products:
            left, right = (_group_of(problem, site) for site in (product.left, product.right))
            x, y = (_FLOAT if g is None else problem.groups[g].bits for g in (left, right))
            table = np.asarray([[self.of_product(problem, product, a, b) for b in y] for a in x], dtype=np.float64)
            if left is not None and left == right:
                unary[left] = unary[left] + np.diagonal(table)
            elif left is not None and len(y) == 1:
                unary[left] = unary[left] + table[:, 0]
            elif right is not None and len(x) == 1:
                unary[right] = unary[right] + table[0]
            elif left is not None and right is not None:
                first, second, of_both = (left, right, table) if left < right else (right, left, table.T)
                pairs[first, second] = pairs.get((first, second), 0) + of_both
        return (LinearCost(row.constant, tuple(unary), pairs),)

    def _total(self, problem: Problem, bits: int) -> float:
        return super()._total(problem, bits) + sum(self.of_product(problem, p, bits, bits) for p in problem.products)


@register_cost("bops")
class BitOperations(OperationCost):
    """Bit operations: MACs · weight bits · activation bits."""

    short, title, unit, forms, shown_as = "BOPs", "bit operations", BIT_OPERATIONS, ("x", "%"), "%"
    examples = ('"50%"', '"20x"', '"1.5G"')

    def of_product(self, problem: Problem, product: ActivationProduct, left_bits: int, right_bits: int) -> float:
        """Of one image."""
        return product.macs * left_bits * right_bits

    def of(self, problem: Problem, layer: Layer, weight_bits: int, activation_bits: int) -> float:
        """Of one image."""
        return layer.macs * weight_bits * activation_bits

    def missing(self, problem: Problem) -> str:
        """MACs."""
        has_macs = any(layer.macs for layer in problem.layers)
        return "" if has_macs else "BOPs need the layers' MACs: find the sites with an example batch."

    def figures(self, problem: Problem, cost: float) -> dict[str, float]:
        """MACs, and BOPs at 8 bits and float32."""
        macs = float(sum(x.macs for x in problem.layers) + sum(p.macs for p in problem.products))
        return {"macs": macs, "bops_8bit": 64 * macs, "bops_float": 1024 * macs}


@register_cost("act_bytes")
class ActivationBytes(SiteCost):
    """Elements of activation sites of one image · bits: the paper's A-Comp (Table 2)."""

    kind, words, title = "activation", ("act", "activations"), "activations, one image (A-Comp)"
    unit, forms, shown_as, examples = BYTES, ("x", "%", "bit"), "x", ('"7.6x"', '"4bit"', '"2MiB"')

    def of(self, problem: Problem, site: Site, bits: int) -> float:
        """Of one image."""
        return code_bytes(site.numel, bits, code_of(problem, site, bits))

    def missing(self, problem: Problem) -> str:
        """Activation sites."""
        quantized = any(s.kind == "activation" for s in problem.sites)
        return "" if quantized else f"{self.name} needs activation sites; none is quantized here."

    def figures(self, problem: Problem, cost: float) -> dict[str, float]:
        """Bits, size at float32, mean bits, A-Comp."""
        elements = _elements(problem, "activation")
        return {
            "act_bits": 8 * cost, "float_act_bytes": 4.0 * elements, "mean_act_bits": 8 * cost / elements,
            "a_comp": 4.0 * elements / cost,
        }  # fmt: skip


@register_cost("act_peak_bytes")
class PeakActivationBytes(SiteCost):
    """The most activation memory at any time step: one row a step."""

    kind, words, title = "activation", ("act_peak",), "activations, most at a time (one image)"
    unit, forms, shown_as, examples, table = BYTES, ("x", "%"), "x", ('"256KiB"', '"4x"'), "steps"
    without_table = "Peak activation memory needs time steps: pass steps=activation_steps(model, batch)."

    def of(self, problem: Problem, site: Site, bits: int) -> float:
        """Of one image; what is alive at a time scales it."""
        return code_bytes(site.numel, bits, code_of(problem, site, bits))

    def rows(self, problem: Problem) -> tuple[LinearCost, ...]:
        """Steps with the same live sites are one row."""
        most_waiting: dict[tuple[tuple[str, int], ...], float] = {}
        for live, waiting in _steps(problem):
            key = tuple(sorted(live.items(), key=lambda item: problem.index[item[0]]))
            most_waiting[key] = max(most_waiting.get(key, 0.0), waiting * FLOAT_BITS / 8)
        return tuple(
            site_row(problem, _alive(problem, dict(key)), self.kind, waiting) for key, waiting in most_waiting.items()
        )

    def float32(self, problem: Problem) -> float:
        """All that is alive, as float32."""
        return max(sum(step.values()) for step in problem.steps) * FLOAT_BITS / 8

    def eight_bit(self, problem: Problem) -> float:
        """What waits as float32 stays so."""
        return max(sum(live.values()) + 4 * waiting for live, waiting in _steps(problem))


@register_cost("latency_ms")
class Latency(LayerCost):
    """Milliseconds of a table, added up over layers."""

    words, title, unit, forms, table = ("latency",), "latency by the table, one image", MILLISECONDS, ("%",), "latency"
    examples = ('"3ms"', '"50%"')
    without_table = (
        "A latency budget needs a latency table: give latency=latency.csv, a CSV of layer, weight_bits, ms "
        "(selector.latency=... in the shell)."
    )

    def of(self, problem: Problem, layer: Layer, weight_bits: int, activation_bits: int) -> float:
        """As the table says."""
        table: LatencyTable = table_of(problem, self.table)
        shape = problem.sites[problem.index[layer.weight]].shape
        return table.ms(layer, shape, weight_bits, activation_bits)

    def float32(self, problem: Problem) -> float:
        """Tables have no float32 row that could be trusted.

        Raises:
            HawqError: always.
        """
        raise HawqError(f"{self.name} has no float32 value to be times smaller than; give an absolute figure.")


_FLOAT = (FLOAT_BITS,)


def _group_of(problem: Problem, site: str | None) -> int | None:
    """The group of an activation site; ``None``: it stays float."""
    return problem.group_of[problem.index[site]] if site in problem.index else None


def _steps(problem: Problem) -> Iterator[tuple[dict[str, int], int]]:
    """Of every time step the elements held at a site's bits, by site, and those that wait as float32."""
    quantized = {s.name for s in problem.sites if s.kind == "activation"}
    for step in problem.steps:
        live = {k: n for k, n in step.items() if k in quantized}
        yield live, sum(n for k, n in step.items() if k not in live)


@register_cost("model_bytes")
class ModelBytes(StoredBytes):
    """The whole model: codes and scales of the quantized weights, everything else at its own type.

    It is what the tensors of the packed file take; its header, and tables of activations' quantizers, are left out.
    """

    words, title = ("model",), "whole model, float parts included"
    forms, shown_as, bare, examples = ("x",), "x", (), ('"6x"', '"3MB"')

    def missing(self, problem: Problem) -> str:
        """What the sites leave of the model."""
        if problem.float_bytes is not None:
            return ""
        return (
            "A budget of the whole model needs the bytes that stay float: give the SiteTable of "
            "hawq_lightning.sites(model, batch)."
        )

    def constant(self, problem: Problem) -> float:
        """Float tensors."""
        return problem.float_bytes or 0

    def float32(self, problem: Problem) -> float:
        """Every float tensor as float32, whatever its type in the model; others at their own type."""
        return (problem.float_rest or 0) + 4.0 * _elements(problem, "weight")

    def figures(self, problem: Problem, cost: float) -> dict[str, float]:
        """Size of the model as float32, compression, the quantized weights' share, and what of it stays float."""
        full = self.float32(problem)
        return {
            "float_model_bytes": full, "model_comp": full / cost, "kept_bytes": float(self.constant(problem)),
            "quantized_share": 4.0 * _elements(problem, "weight") / full,
        }  # fmt: skip
