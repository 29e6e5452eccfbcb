"""Losses that run the network in transforms of ``torch.func``: one clear error in the place of torch's many."""

from __future__ import annotations

import traceback

_TRANSFORMS = ("/_functorch/", "\\_functorch\\")
_HERE = ("/hawq_lightning/", "\\hawq_lightning\\")
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
    inside = [n for n, frame in enumerate(frames) if any(part in frame.filename for part in _TRANSFORMS)]
    if not inside:
        return False
    ours = (f for f in frames[inside[0] :] if any(part in f.filename for part in _HERE) and f.name not in _PASSED_ON)
    return _WATCHED in str(error) or any(True for _ in ours)
