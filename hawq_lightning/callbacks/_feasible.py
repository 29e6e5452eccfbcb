"""What can be told before the traces are known, and what makes them doubtful."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import nn

from hawq_lightning._batches import batch_images
from hawq_lightning._errors import HawqError
from hawq_lightning._plan import Plan
from hawq_lightning._site_table import SiteTable
from hawq_lightning._sites import find_sites
from hawq_lightning.export import packed_overhead
from hawq_lightning.quantization import first_order_term, network_inputs
from hawq_lightning.selection import Problem, activation_steps, check_feasible, nominal_problem, tables_of_budget
from hawq_lightning.sensitivity import Sensitivity, isolated_eval

if TYPE_CHECKING:
    from hawq_lightning.callbacks._measure import MeasureTraces

_CHANCE = 0.8  # of ln(classes)
_SLOPE_SHARE = 0.01  # of the loss
_SLOPE_OVER = 2.0  # times half of Omega: trained networks reach 1.5 (ResNet20 on augmented CIFAR-10)


def preview(
    asked: MeasureTraces, module: nn.Module, batch: Any, loss_fn: Callable[[Any, Any], Any]
) -> tuple[SiteTable, Problem]:
    """The sites, and the problem before anything is measured, on which budget and bits given by hand are tried.

    Args:
        asked: widths, budget, selector, constraints.
        module: the user's; left as it was.
        batch: one.
        loss_fn: runs the module on it.

    Raises:
        HawqError: no sites, constraints that contradict each other, or what no plan can meet.
    """
    with isolated_eval(module):
        exclude = asked.excluded(module)
        table = find_sites(module, lambda: loss_fn(module, batch), batch_images(batch), asked.include, exclude)
        wanted = asked.activation_bits is not None and asked.input_bits is not None
        inputs = network_inputs(module, batch, loss_fn, table) if wanted else frozenset()
        given = dict(asked.constraints)
        if "steps" in tables_of_budget(asked.budget, given.get("extra_costs") or ()):
            given.setdefault("steps", activation_steps(module, batch, table, forward=loss_fn, evaluate=False))
    kept = [s for s in table if s.kind == "weight" or asked.activation_bits is not None]
    problem = nominal_problem(
        table, weight_bits=asked.weight_bits, activation_bits=asked.activation_bits, input_bits=asked.input_bits,
        inputs=inputs, quantizer=asked.quantizer, file_overhead=packed_overhead(module, kept, asked.quantizer), **given,
    )  # fmt: skip
    check_feasible(problem, asked.budget, asked.selector, asked.bits)
    return table, problem


def check_covers(sensitivity: Sensitivity, table: SiteTable) -> None:
    """Raise HawqError unless these traces are those of these sites."""
    missing = [s.name for s in table if s.name not in sensitivity]
    if missing:
        raise HawqError(
            f"The sensitivity has no trace for {', '.join(missing[:4])}; it was measured on another model "
            f"(its first site is {next(iter(sensitivity)).name})."
        )
    for s in table:
        if sensitivity[s.name].numel != s.numel:
            raise HawqError(
                f"The sensitivity was measured on another model: {s.name} has {s.numel} elements here and "
                f"{sensitivity[s.name].numel} there."
            )


def warn_untrained(
    sensitivity: Sensitivity, module: nn.Module, batches: list[Any], loss_fn: Callable[[Any, Any], Any], plan: Plan
) -> None:
    """Warn where a loss near chance, or a gradient term that outweighs Omega, says that this is no minimum."""
    loss, classes = (float(sensitivity.settings.get(k, 0.0)) for k in ("loss", "classes"))
    if classes > 1 and loss > _CHANCE * math.log(classes):
        rank_zero_warn(
            f"HAWQ: the loss is {loss:.3g} and chance is ln({classes:.0f}) = {math.log(classes):.3g}: the network "
            "looks untrained. Traces mean something near a minimum; load trained weights, or give start=<epochs>."
        )
        return
    slope = first_order_term(module, batches, loss_fn, plan)
    curve = sum(s.omega or 0.0 for s in plan.weights) / 2
    if abs(slope) > _SLOPE_OVER * curve and abs(slope) > _SLOPE_SHARE * abs(loss):
        rank_zero_warn(
            f"HAWQ: the gradient term g.dW = {slope:.3g} outweighs half of Omega = {curve:.3g}: the network has "
            "not converged, and the prediction cannot be trusted. Train further, or give start=<epochs>."
        )
