"""The problem before anything is measured: what no plan of it meets, no measurement will make possible."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from hawq_lightning._plan import Candidate
from hawq_lightning._site_table import SiteTable
from hawq_lightning.quantization import QuantizerSpec, quantizer_named
from hawq_lightning.selection._budget import parse_budget
from hawq_lightning.selection._problem import Problem
from hawq_lightning.selection._request import Request
from hawq_lightning.selection._scores import DEFAULT_SCORE
from hawq_lightning.selection._selectors import SELECTORS


def nominal_problem(
    sites: SiteTable,
    *,
    weight_bits: Sequence[int],
    activation_bits: Sequence[int] | None,
    input_bits: int | None = 8,
    inputs: Collection[str] = (),
    quantizer: str | QuantizerSpec = "uniform",
    file_overhead: int = 0,
    **constraints: object,
) -> Problem:
    """Every site with every width it may take, and an Ω of 0 throughout.

    Args:
        sites: table of the model.
        weight_bits: widths of weights.
        activation_bits: widths of activations; ``None`` leaves them float.
        input_bits: of what the network itself reads; ``None``: as other activations.
        inputs: activation sites that read it.
        quantizer: registered name, or what :func:`quantizer_named` returned; codebooks count in a file's size.
        file_overhead: bytes of the packed file that no choice changes, scales and codes excluded.
        constraints: keywords of :class:`Problem`.

    Raises:
        HawqError: what :class:`Problem` refuses.
    """
    spec = quantizer_named(quantizer)
    weights, of_activations = spec.weight_quantizer(1, 0), spec.activation_quantizer().code
    candidates = {
        s.name: tuple(Candidate(b, weights.code_formats(b)[0], 0.0, 0.0) for b in weight_bits) for s in sites.weights
    }
    for s in sites.activations if activation_bits is not None else ():
        widths = (input_bits,) if s.name in inputs and input_bits is not None else activation_bits or ()
        widths = widths if s.fixed_bits is None else (s.fixed_bits,)
        candidates[s.name] = tuple(Candidate(b, of_activations, 0.0, 0.0) for b in widths)
    return Problem(sites, candidates, None, file_overhead, **(constraints | {"score": DEFAULT_SCORE}))  # type: ignore[arg-type]


def check_feasible(
    problem: Problem, budget: object, selector: str = "pareto", bits: Mapping[str, int] | str | Path | None = None
) -> None:
    """Refuse a budget that no plan meets, or bits given by hand that are not on offer.

    Args:
        problem: of :func:`nominal_problem`.
        budget: as for :func:`hawq_lightning.select`.
        selector: that will choose; rules that need no numbers are tried themselves, the others' budgets exactly.
        bits: for ``manual``.

    Raises:
        HawqError: with the cheapest plan by each budget.
    """
    limits = () if budget is None else parse_budget(budget, problem)
    if "preview" in SELECTORS[selector].offers:
        SELECTORS[selector].choose(Request(problem, limits, bits=bits))
    elif limits:
        Request(problem, limits).argmin()
