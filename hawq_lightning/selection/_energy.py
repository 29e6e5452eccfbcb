"""Energy of one image: picojoules a multiply-accumulate by its bits, and picojoules a byte moved.

The table that comes with the package is of 45 nm and 0.9 V, by Horowitz, "Computing's energy problem (and what we can
do about it)", ISSCC 2014, figure 1.1.9: integer additions 0.03 pJ (8 bits) and 0.1 pJ (32), integer multiplications
0.2 pJ (8) and 3.1 pJ (32), float32 additions 0.9 pJ and multiplications 3.7 pJ; 64 bits from a cache of 8 KB 10 pJ,
of 32 KB 20 pJ, of 1 MB 100 pJ, from DRAM 1.3 to 2.6 nJ. What is ours: below 8 bits a multiplier's energy goes with the
product of the widths, as its partial products do; sums are of 32 bits; weights come from DRAM (1.3 nJ) once an image,
and what a layer reads from the cache of 1 MB once a layer. Whoever knows the device replaces it.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Mapping
from pathlib import Path

from hawq_lightning._code_formats import code_bytes
from hawq_lightning._errors import HawqError
from hawq_lightning._fields import shown
from hawq_lightning._site_table import ActivationProduct, Layer
from hawq_lightning.selection._built_in_costs import OperationCost, code_of
from hawq_lightning.selection._constraints import FLOAT_BITS
from hawq_lightning.selection._cost import table_of
from hawq_lightning.selection._costs import register_cost
from hawq_lightning.selection._problem import Problem
from hawq_lightning.selection._units import Unit

_MULTIPLY_8, _ADD_32, _FLOAT_MAC = 0.2, 0.1, 3.7 + 0.9
_DRAM_BYTE, _CACHE_BYTE = 1300 / 8, 100 / 8
_MAC, _WEIGHT_BYTE, _ACTIVATION_BYTE = "mac", "weight_byte", "activation_byte"
_BITS = ("weight_bits", "activation_bits")
_WIDTHS = (*range(1, 9), FLOAT_BITS)


class EnergyTable:
    """Picojoules of a device.

    Args:
        mac: (weight bits, activation bits) -> pJ of a multiply-accumulate; 32: float. Pairs that it lacks do not exist
            on the device.
        weight_byte: pJ to bring a byte of weights to the arithmetic.
        activation_byte: the same for what a layer reads.
        source: for messages.

    Raises:
        HawqError: a number that is negative, infinite or none, or widths out of range.
    """

    def __init__(
        self,
        mac: Mapping[tuple[int, int], float],
        weight_byte: float = 0.0,
        activation_byte: float = 0.0,
        source: str = "the energy table",
    ) -> None:
        self.mac = {pair: _picojoules(pj, f"a MAC of {pair} bits in {source}") for pair, pj in mac.items()}
        self.weight_byte = _picojoules(weight_byte, f"{_WEIGHT_BYTE} of {source}")
        self.activation_byte = _picojoules(activation_byte, f"{_ACTIVATION_BYTE} of {source}")
        for pair in self.mac:
            if not set(pair) <= {*_WIDTHS}:
                raise HawqError(f"{source} has MACs of {pair} bits; widths are 1 to 8, or {FLOAT_BITS} for float.")
        if not self.mac:
            raise HawqError(f"There are no MACs in {source}.")

    def __repr__(self) -> str:  # tables of the same numbers are the same in a fingerprint
        return f"EnergyTable({self.mac}, {self.weight_byte}, {self.activation_byte})"

    @classmethod
    def load(cls, path: str | Path) -> EnergyTable:
        """Read a CSV of ``what,weight_bits,activation_bits,pj``, where ``what`` is mac, weight_byte or activation_byte.

        Raises:
            HawqError: no such file, or rows that cannot be understood; the message names the line.
        """
        source = f"the energy table {path}"
        try:
            with Path(path).open(newline="", encoding="utf-8-sig") as file:
                return cls._of_rows(list(csv.DictReader(file)), source)
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise HawqError(f"{source} cannot be read: {getattr(error, 'strerror', None) or error}.") from error

    @classmethod
    def _of_rows(cls, rows: Iterable[Mapping[str, str | None]], source: str) -> EnergyTable:
        mac: dict[tuple[int, int], float] = {}
        moved = {_WEIGHT_BYTE: 0.0, _ACTIVATION_BYTE: 0.0}
        for line, row in enumerate(rows, start=2):
            where, what = f"line {line} of {source}", (row.get("what") or "").strip()
            pj = _number(row.get("pj"), f"pj in {where}")
            if what in moved:
                moved[what] = pj
            elif what == _MAC:
                widths = [
                    _number(row.get(f"{kind}_bits"), f"{kind}_bits in {where}") for kind in ("weight", "activation")
                ]
                mac[int(widths[0]), int(widths[1])] = pj
            else:
                raise HawqError(f"{where} is about {shown(what)}; use {_MAC}, {', '.join(moved)}.")
        return cls(mac, moved[_WEIGHT_BYTE], moved[_ACTIVATION_BYTE], source)

    def of_mac(self, weight_bits: int, activation_bits: int) -> float:
        """pJ, or ``inf`` where the device lacks these bits."""
        return self.mac.get((weight_bits, activation_bits), math.inf)


def _horowitz(weight_bits: int, activation_bits: int) -> float:
    if FLOAT_BITS in (weight_bits, activation_bits):
        return _FLOAT_MAC
    return _MULTIPLY_8 * weight_bits * activation_bits / 64 + _ADD_32


@register_cost("energy_pj")
class Energy(OperationCost):
    """Multiply-accumulates and bytes moved of one image, by an :class:`EnergyTable`.

    Of inputs that stay float the operations count, but no bytes, since their elements are not known.
    """

    short, words, title = "Energies", ("energy",), "energy by the table, one image"
    unit = Unit({"pJ": 1.0, "nJ": 1e3, "uJ": 1e6, "mJ": 1e9}, ("mJ", "uJ", "nJ", "pJ"))
    forms, shown_as, examples = ("%", "x"), "%", ('"50%"', '"300uJ"')
    asked_for = True

    def of(self, problem: Problem, layer: Layer, weight_bits: int, activation_bits: int) -> float:
        """Of one image."""
        table = energy_table(problem)
        energy = layer.macs * table.of_mac(weight_bits, activation_bits)
        energy += table.weight_byte * _bytes(problem, layer.weight, weight_bits)
        return energy + table.activation_byte * _bytes(problem, layer.activation, activation_bits)

    def of_product(self, problem: Problem, product: ActivationProduct, left_bits: int, right_bits: int) -> float:
        """Of one image."""
        table = energy_table(problem)
        moved = _bytes(problem, product.left, left_bits) + _bytes(problem, product.right, right_bits)
        return product.macs * table.of_mac(left_bits, right_bits) + table.activation_byte * moved

    def figures(self, problem: Problem, cost: float) -> dict[str, float]:
        """With every width at 8 bits, where the device has them."""
        whole = self._total(problem, 8)
        return {"energy_8bit_pj": whole} if math.isfinite(whole) else {}


def energy_table(problem: Problem) -> EnergyTable:
    """The problem's table, read from its file where it is a path; the package's where there is none.

    Raises:
        HawqError: it is none.
    """
    given = table_of(problem, "energy")
    if given is None or isinstance(given, EnergyTable):
        return given or HOROWITZ_45NM
    if isinstance(given, (str, Path)):
        return _loaded(str(given))
    raise HawqError(f"tables={{'energy': ...}} is {shown(given)}; give an EnergyTable, or the path of its CSV.")


_LOADED: dict[str, EnergyTable] = {}


def _loaded(path: str) -> EnergyTable:
    if path not in _LOADED:
        _LOADED[path] = EnergyTable.load(path)
    return _LOADED[path]


def _bytes(problem: Problem, name: str | None, bits: int) -> float:
    """What is moved of a site; nothing of one that is not known."""
    if name not in problem.index:
        return 0.0
    site = problem.sites[problem.index[name]]
    return code_bytes(site.numel, bits, code_of(problem, site, bits))


def _number(value: str | None, what: str) -> float:
    try:
        return float((value or "").strip())
    except ValueError:
        raise HawqError(f"{what} is {shown(value)}, not a number.") from None


def _picojoules(value: float, what: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
        raise HawqError(f"{what} is {shown(value)}; energies are finite numbers, 0 or more.")
    return float(value)


HOROWITZ_45NM = EnergyTable(
    {(w, a): _horowitz(w, a) for w in _WIDTHS for a in _WIDTHS}, _DRAM_BYTE, _CACHE_BYTE, "Horowitz, ISSCC 2014, 45 nm"
)
