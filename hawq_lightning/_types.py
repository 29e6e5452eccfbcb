"""Names for what Python's types cannot say."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import nn

Batch: TypeAlias = Any
"""What a dataloader yields: tensors in lists, dicts, dataclasses or classes of the user's own."""

Outputs: TypeAlias = Any
"""What a network returns: a tensor, or tensors in lists, tuples, dicts or objects."""

LossFn: TypeAlias = Callable[[nn.Module, Batch], torch.Tensor]
"""``loss_fn(model, batch) -> scalar``."""

BatchSizeFn: TypeAlias = Callable[[Batch], int]
"""Number of samples (images, sentences ...) in a batch."""

JsonObject: TypeAlias = dict[str, Any]
"""A JSON object, keys and values as ``json.loads`` gives them."""
