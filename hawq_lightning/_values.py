"""Tensors without values: the ``meta`` device, and lazy layers."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from hawq_lightning._errors import HawqError, some


def check_has_values(model: nn.Module, what: str) -> None:
    """Refuse a model on the ``meta`` device, before anything of it is changed.

    Args:
        model: any module.
        what: that needs values, for the message.

    Raises:
        HawqError: a parameter or buffer has none; the message names it.
    """
    for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
        if tensor.is_meta:
            raise HawqError(
                f"{what} needs a model with values, but {name!r} is on the meta device: give it memory first "
                "(model.to_empty(device='cpu')) and load its weights."
            )


def check_can_be_trained(model: nn.Module) -> None:
    """Refuse a model with lazy layers that have not run yet, or with parameters of inference mode outside of it.

    Args:
        model: any module.

    Raises:
        HawqError: the message names the layer or the parameter.
    """
    held = [*model.named_parameters(), *model.named_buffers()]
    refuse_lazy(model, [*dict.fromkeys(name.rpartition(".")[0] for name, tensor in held if is_lazy(tensor))])
    for name, parameter in model.named_parameters():
        if parameter.is_inference() and parameter.requires_grad and not torch.is_inference_mode_enabled():
            raise HawqError(
                f"The parameter {name!r} was made under torch.inference_mode(), so nothing can be trained through it: "
                "make the network outside of it; lazy layers are made in their first pass, as in trainer.validate."
            )


def refuse_lazy(model: nn.Module, layers: Sequence[str]) -> None:
    """Raise HawqError if there are lazy layers of these names."""
    if layers:
        raise HawqError(
            f"{type(model).__name__} has lazy layers that have no weights yet ({some(layers)}): run it once, such as "
            "by model(batch), before it is quantized or given to trainer.fit."
        )
