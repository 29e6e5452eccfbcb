"""Tensors without values: the ``meta`` device."""

from __future__ import annotations

import itertools

from torch import nn

from hawq_lightning._errors import HawqError


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
