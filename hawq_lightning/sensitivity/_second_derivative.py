"""One sentence for losses that cannot be differentiated twice, in the place of what autograd says."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch.autograd.graph import GradientEdge, Node

from hawq_lightning._errors import HawqError

_NOT_IMPLEMENTED = re.compile(r"derivative for (?:aten::)?_*(\w+?)(?:_backward\w*)? is not implemented")
_ONCE = "@once_differentiable"


class NoSecondDerivative(HawqError):
    """An operation on the way cannot be differentiated twice."""


@contextmanager
def told_in_one_sentence() -> Iterator[None]:
    """Second derivatives are taken inside.

    Raises:
        NoSecondDerivative: there are none; the message names the operator and says what to do. Other errors pass.
    """
    try:
        yield
    except (RuntimeError, NotImplementedError) as error:
        message = str(error)
        operator = _NOT_IMPLEMENTED.search(message)
        if operator is None and _ONCE not in message:
            raise
        name = f"the operator {operator[1]}" if operator else "an autograd function that is once_differentiable"
        raise NoSecondDerivative(_sentence(name)) from error


def check_twice_differentiable(loss: torch.Tensor, edges: Sequence[GradientEdge]) -> None:
    """Look for functions of the user's own whose gradient autograd takes for a constant, silently.

    Args:
        loss: scalar with a graph.
        edges: where to stop.

    Raises:
        NoSecondDerivative: there is one on the way; the message names it.
    """
    stack: list[Node | None] = [loss.grad_fn]
    visited: set[Node] = {e.node for e in edges}
    while stack:
        node = stack.pop()
        if node is None or node in visited:
            continue
        visited.add(node)
        function = getattr(node, "_forward_cls", None)
        code = getattr(getattr(function, "backward", None), "__code__", None)
        if code is not None and code.co_qualname.startswith("once_differentiable."):
            raise NoSecondDerivative(_sentence(f"{function.__name__}, whose backward is once_differentiable"))  # type: ignore[union-attr]
        stack += [parent for parent, _ in node.next_functions]


def _sentence(name: str) -> str:
    return (
        f"The loss has no second derivative, since it goes through {name}: measure with another loss (loss_fn=), such "
        "as a smooth stand-in, or choose bits without traces (selector='l2' or 'uniform' of "
        "hawq_lightning.selection.select)."
    )
