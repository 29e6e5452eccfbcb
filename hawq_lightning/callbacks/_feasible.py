"""Checks before the traces are measured, and what makes them doubtful."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from itertools import chain

from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from hawq_lightning._batches import batch_images, fresh_copy
from hawq_lightning._config import QuantizerConfig, SelectConfig, check_bits
from hawq_lightning._errors import HawqError
from hawq_lightning._loss_graph import Trained
from hawq_lightning._patterns import Pattern, as_list, own_exclude
from hawq_lightning._plan import Plan
from hawq_lightning._site_table import SiteTable
from hawq_lightning._sites import find_sites
from hawq_lightning._types import Batch, BatchSizeFn, LossFn
from hawq_lightning.export import packed_overhead
from hawq_lightning.quantization import FloatDistance, first_order_term, network_inputs, quantizer_of
from hawq_lightning.selection import (
    NO_CLASSES,
    Problem,
    activation_steps,
    check_feasible,
    constraints_of,
    loss_budget,
    nominal_problem,
    tables_of_budget,
)
from hawq_lightning.sensitivity import Sensitivity, isolated_eval, repeatable, settle_draws

_CHANCE = 0.8  # of ln(classes)
_SLOPE_SHARE = 0.01  # of the loss
_SLOPE_OVER = 2.0  # times half of Omega: trained networks reach 1.5 (ResNet20 on augmented CIFAR-10)


def exclude_patterns(quantizer: QuantizerConfig, module: nn.Module) -> list[Pattern]:
    """Patterns of layers that stay float: those of the config, and the module's own ``quantization_exclude``."""
    return [*own_exclude(module), *as_list(quantizer.exclude, "exclude")]


def preview(
    quantizer: QuantizerConfig,
    select: SelectConfig,
    module: nn.Module,
    batch: Batch,
    loss_fn: LossFn,
    *,
    later: Sequence[Batch] = (),
    trained: Trained | None = None,
    size_of: BatchSizeFn = batch_images,
) -> tuple[SiteTable, Problem]:
    """The sites, and the problem before anything is measured, on which budget and bits given by hand are tried.

    Args:
        quantizer: which layers, and the widths to choose from.
        select: budget, selector, constraints.
        module: the user's; left as it was.
        batch: a batch to run it on.
        loss_fn: runs the module on it.
        later: further batches, for layers that the first does not use.
        trained: the parameters that training moves; those that want gradients when not given.
        size_of: number of samples in a batch.

    Raises:
        HawqError: no sites, constraints that contradict each other, what no plan can meet, or a budget by loss of
            outputs that cannot be compared.
    """
    spec, budget = quantizer_of(quantizer), select.budget
    weight_bits = check_bits(quantizer.weight_bits, "weight")
    activation_bits = None if quantizer.activation_bits is None else check_bits(quantizer.activation_bits, "activation")
    with isolated_eval(module):
        plain, loss_fn = loss_fn, repeatable(module, loss_fn)
        exclude = exclude_patterns(quantizer, module)

        def find() -> SiteTable:
            passes = ((partial(loss_fn, module, b), size_of(b)) for b in chain((batch,), later))
            return find_sites(
                module,
                *next(passes),
                quantizer.include,
                exclude,
                later=passes,
                trained=trained,
                attention="prepared" if quantizer.attention else False,
                integer=quantizer.integer_grids,
            )

        table = find()
        if settle_draws(module, loss_fn, table, chain((batch,), later)):
            table = find()
        separate_input = activation_bits is not None and quantizer.input_bits is not None
        inputs = network_inputs(module, batch, loss_fn, table) if separate_input else frozenset()
        constraints = constraints_of(select)
        constraints.pop("score", None)  # no score is known yet, and none matters to what is feasible
        if "steps" in tables_of_budget(budget, constraints.get("extra_costs") or ()):
            constraints.setdefault(
                "steps",
                activation_steps(
                    module, fresh_copy(batch), table, forward=plain, evaluate=False, images=size_of(batch)
                ),
            )
    quantized = [s for s in table if s.kind == "weight" or activation_bits is not None]
    overhead = packed_overhead(module, quantized, spec, table.biases)
    problem = nominal_problem(
        table, weight_bits=weight_bits, activation_bits=activation_bits, input_bits=quantizer.input_bits,
        inputs=inputs, quantizer=spec, file_overhead=overhead, **constraints,
    )  # fmt: skip
    check_feasible(problem, budget, select.selector, select.bits)
    if (loss := loss_budget(budget)) is not None:
        target = FloatDistance(module, [fresh_copy(batch)], plain)
        if loss.changed is not None and not target.classifies:
            raise HawqError(NO_CLASSES)
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
    sensitivity: Sensitivity, module: nn.Module, batches: Sequence[Batch], loss_fn: LossFn, plan: Plan
) -> None:
    """Warn where a loss near chance, or a gradient term that outweighs Omega, says that this is no minimum."""
    loss, classes = (float(sensitivity.settings.get(k, 0.0)) for k in ("loss", "classes"))
    if classes > 1 and loss > _CHANCE * math.log(classes):
        rank_zero_warn(
            f"HAWQ: the loss is {loss:.3g} and chance is ln({classes:.0f}) = {math.log(classes):.3g}: the network "
            "looks untrained. Traces mean something near a minimum; load trained weights, or give start_epoch=<epochs>."
        )
        return
    slope = first_order_term(module, batches, loss_fn, plan)
    curve = sum(s.omega or 0.0 for s in plan.weights) / 2
    if abs(slope) > _SLOPE_OVER * curve and abs(slope) > _SLOPE_SHARE * abs(loss):
        rank_zero_warn(
            f"HAWQ: the gradient term g.dW = {slope:.3g} outweighs half of Omega = {curve:.3g}: the network has "
            "not converged, and the prediction cannot be trusted. Train further, or give start_epoch=<epochs>."
        )
