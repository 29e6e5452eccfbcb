"""Views and in-place operations: where autograd would lose a hook."""

from __future__ import annotations

import torch


def without_base(x: torch.Tensor) -> torch.Tensor:
    """``x``, or a copy of it in the graph where it is a view.

    An in-place operation on a view gives it a new node, made from the node of its base: the one that hooks and edges
    were taken at is no longer on the way to the loss (``F.linear`` with a bias returns a view of a matrix for inputs of
    three axes). A tensor that is no view keeps its old node behind the new one.
    """
    return x.clone() if x.requires_grad and x._is_view() else x
