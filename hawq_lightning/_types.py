"""Names for what Python's types cannot say."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias, TypeVar

import torch
from torch import nn

Model = TypeVar("Model", bound=nn.Module)
"""The type of a model that a function takes and gives back."""

Batch: TypeAlias = Any
"""What a dataloader yields: tensors in lists, dicts, dataclasses or classes of the user's own."""

Outputs: TypeAlias = Any
"""What a network returns: a tensor, or tensors in lists, tuples, dicts or objects."""

LossFn: TypeAlias = Callable[[nn.Module, Batch], torch.Tensor]
"""``loss_fn(model, batch) -> scalar``."""

BatchSizeFn: TypeAlias = Callable[[Batch], int]
"""Number of samples (images, sentences ...) in a batch."""

Options: TypeAlias = Mapping[str, Any]
"""Keyword arguments by name, for what a user's own class takes."""

StateDict: TypeAlias = dict[str, Any]
"""A checkpoint or the state of an object: tensors and plain values by name."""

AutogradContext: TypeAlias = Any
"""The ``ctx`` of a torch.autograd.Function: torch declares none of the attributes that are kept on it."""

FunctionInputs: TypeAlias = tuple[Any, ...]
"""Arguments of a torch.autograd.Function's ``forward``, as ``setup_context`` gets them."""

Budget: TypeAlias = str | Mapping[str, str | float]
"""``"12x"``, ``"8MB"``, ``{"bops": "50%"}``: one bound, or several by name."""

JsonObject: TypeAlias = dict[str, Any]
"""A JSON object, keys and values as ``json.loads`` gives them."""
