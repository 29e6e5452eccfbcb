"""Plans that were not chosen here: given by the user, edited by hand, or read from a model that came quantized."""

from __future__ import annotations

import torch

from hawq_lightning._code_formats import code_bytes
from hawq_lightning._errors import HawqError
from hawq_lightning._plan import Plan
from hawq_lightning.quantization import quantized_reads
from hawq_lightning.selection import recost


def agrees(plan: Plan, module: torch.nn.Module) -> bool:
    """Whether a model's quantizers have a plan's bits."""
    layers = quantized_reads(module)
    return all(n in layers and layers[n].quantizer_of(s.kind).bits == s.bits for s in plan.sites for n in s.layers)


def consistent(plan: Plan | None) -> Plan | None:
    """A plan whose bits were edited by hand, with grids, Omega and costs that follow from them."""
    if plan is None or (settled := plan.reconciled()) is plan:
        return plan
    try:
        return recost(plan)
    except HawqError:  # a width that was never weighed: weights can have it all the same
        return with_sizes(settled.replace(selector="manual"))


def with_sizes(plan: Plan) -> Plan:
    """A plan without a history, with the costs that bits alone tell."""
    size = sum(code_bytes(s.numel, s.bits, s.code) for s in plan.weights)
    costs = {"weight_bytes": size, "float_weight_bytes": 4.0 * sum(s.numel for s in plan.weights)}
    return plan.replace(costs=costs)
