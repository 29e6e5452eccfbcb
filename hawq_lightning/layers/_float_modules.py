"""Modules with parameters that are of no kind: what a user is told about them."""

from __future__ import annotations

from torch import nn
from torch.nn.utils.parametrize import ParametrizationList

from hawq_lightning.layers._adopted import changes
from hawq_lightning.layers._kind import kinds
from hawq_lightning.layers._replaced import replaced

RECURRENT, ATTENTION = "recurrent", "functional attention"
_REASONS: tuple[tuple[tuple[type[nn.Module], ...], str], ...] = (((nn.RNNBase, nn.RNNCellBase), RECURRENT),)


def why_float(module: nn.Module) -> str:
    """Why a module's parameters stay float, in a few words."""
    if hasattr(module, "parametrizations") or isinstance(module, ParametrizationList):
        return "its weight is parametrized"
    for kind in kinds():
        if isinstance(module, kind.float_type):
            if put := replaced(module, kind.float_type):
                return f"another {put[0]} was put in the place of that of {kind.float_type.__name__}"
            changed = changes(type(module), kind.float_type)
            if not changed and (reason := kind.why_float(module)):
                return reason
            name = "forward" if "forward" in changed or not changed else changed[0]
            return f"a subclass of {kind.float_type.__name__} with a {name} of its own"
    for types, reason in _REASONS:
        if isinstance(module, types):
            return reason
    return f"{type(module).__name__} is no known kind of layer"
