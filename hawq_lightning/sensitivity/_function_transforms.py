"""Losses that run the network in transforms of ``torch.func``: one clear error in the place of torch's many."""

from __future__ import annotations

import traceback
from pathlib import Path

import torch

_TRANSFORMS = Path(torch.__file__).parent / "_functorch"
_HERE = Path(__file__).parents[1]
_PASSED_ON = ("__torch_function__", "__torch_dispatch__")  # calls of the user's code go through these
# what torch says, outside of our code, where a loss in a transform meets what watches it
_WATCHED = "saved tensor hooks"
NOT_SEEN = (
    "The loss runs the network in a transform of torch.func (vmap, grad, jacrev, jvp and the like), inside of which "
    "neither weights nor activations can be followed: take such derivatives by torch.autograd.grad(..., "
    "create_graph=True) or torch.autograd.functional, batches without vmap, or give a loss_fn without that part "
    "(callbacks take it as MeasureConfig(loss_fn=...))."
)


def by_function_transform(error: BaseException) -> bool:
    """Whether an error comes of what this package does in a transform of ``torch.func``, and not of the user's code.

    Args:
        error: as it was caught.
    """
    frames = traceback.extract_tb(error.__traceback__)
    first = next((n for n, frame in enumerate(frames) if _TRANSFORMS in Path(frame.filename).parents), None)
    if first is None:
        return False
    return _WATCHED in str(error) or any(
        _HERE in Path(frame.filename).parents and frame.name not in _PASSED_ON for frame in frames[first:]
    )
