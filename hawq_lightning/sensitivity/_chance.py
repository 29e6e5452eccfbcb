"""Functions that draw random numbers while a network trains, without their chance, in every form of call."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from hawq_lightning._types import FunctionInputs, Options

_DROPOUTS = {
    F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout, torch.dropout,
    torch.dropout_, torch.feature_dropout, torch.feature_dropout_, torch.alpha_dropout, torch.alpha_dropout_,
    torch.feature_alpha_dropout, torch.feature_alpha_dropout_,
}  # fmt: skip
# function -> position, name and value of the argument that makes it the same every time
_QUIET: dict[Callable[..., object], tuple[int, str, object]] = {
    F.scaled_dot_product_attention: (4, "dropout_p", 0.0),
    F.multi_head_attention_forward: (13, "training", False),
    F.rrelu: (3, "training", False),
    torch.rrelu: (3, "training", False),
    torch.rrelu_: (3, "training", False),
}


class WithoutChance(TorchFunctionMode):
    """Inside, dropout and its kin are what they are in evaluation mode, also where a function is called by itself."""

    def __torch_function__(
        self, func: Callable[..., object], types: object, args: FunctionInputs = (), kwargs: Options | None = None
    ) -> object:
        kwargs = kwargs or {}
        if func in _DROPOUTS:
            return args[0] if args else kwargs["input"]
        if func in _QUIET:
            position, name, value = _QUIET[func]
            if len(args) > position:
                args = (*args[:position], value, *args[position + 1 :])
            else:
                kwargs = {**kwargs, name: value}
        return func(*args, **kwargs)
