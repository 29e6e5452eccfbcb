"""What a loss's gradient goes through: the graph behind it, and which parameters are trained by it."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import nn
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge, saved_tensors_hooks

from hawq_lightning._batches import parts_of

Result = TypeVar("Result")


@dataclass(frozen=True)
class Trained:
    """Which parameters a training moves.

    Attributes:
        ids: of the parameters.
        other_losses: the loss that is looked at is one of several (optimization by hand): what it does not reach may
            well be trained by another one.
    """

    ids: frozenset[int]
    other_losses: bool = False


_TRAINABLE: weakref.WeakKeyDictionary[nn.Module, frozenset[int]] = weakref.WeakKeyDictionary()


@contextmanager
def trainable_remembered(model: nn.Module) -> Iterator[None]:
    """Inside, :func:`trainable` tells what it tells before, whatever becomes of ``requires_grad``."""
    if model in _TRAINABLE:
        yield
        return
    _TRAINABLE[model] = trainable(model)
    try:
        yield
    finally:
        del _TRAINABLE[model]


def trainable(model: nn.Module) -> frozenset[int]:
    """Ids of the parameters that want gradients."""
    known = _TRAINABLE.get(model)
    return frozenset(id(p) for p in model.parameters() if p.requires_grad) if known is None else known


class _ValuesAskedFor(RuntimeError):
    """A backward pass inside of the loss needs the values that the graph was made without."""


_shape_only: list[bool] = []


def shape_only() -> bool:
    """Whether the graph that is being made needs no values: nothing will be sent back through it."""
    return bool(_shape_only) and _shape_only[-1]


def graph_alone(run: Callable[[], Result]) -> Result:
    """``run()``, whose graph keeps no values, so that it takes no memory; again with values if the loss needs them.

    Args:
        run: makes a graph that is only looked at.
    """

    def refuse(_: object) -> torch.Tensor:
        raise _ValuesAskedFor

    _shape_only.append(True)
    try:
        with saved_tensors_hooks(lambda _: None, refuse):
            return run()
    except _ValuesAskedFor:
        _shape_only[-1] = False
        return run()
    finally:
        _shape_only.pop()


def edge_of(tensor: torch.Tensor) -> GradientEdge:
    """The tensor's place in the graph, also of a subclass whose operations add nodes of their own (MONAI's)."""
    with torch._C.DisableTorchFunctionSubclass():
        return get_gradient_edge(tensor)


def nodes_of(tensor: torch.Tensor) -> list[Node]:
    """The tensor's place in the graph; that of its base too, since in-place changes of a view go on from there."""
    bases = [tensor, *([tensor._base] if tensor._base is not None else [])]
    return [edge_of(t).node for t in bases if t.requires_grad]


def graph_behind(result: object) -> set[Node]:
    """All nodes of the graph behind a loss, or behind any nesting of outputs; none where no graph was made."""
    return set(walk(n for t in tensors_of(result) for n in nodes_of(t)))


def walk(start: Iterable[Node | None], ends: Collection[Node] = ()) -> Iterator[Node]:
    """Nodes from which data flows into some, themselves included, each once.

    Args:
        start: where to begin; leaves and constants have no node.
        ends: nodes that are given, and not passed.
    """
    seen: set[Node] = set()
    stack = list(start)
    while stack:
        node = stack.pop()
        if node is not None and node not in seen:
            seen.add(node)
            yield node
            if node not in ends:
                stack += [parent for parent, _ in node.next_functions]


def tensors_of(value: object) -> list[torch.Tensor]:
    """All tensors in any nesting of containers and dataclasses."""
    return [*_tensors(value, set())]


def _tensors(value: object, seen: set[int]) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif id(value) not in seen:
        seen.add(id(value))
        for part in value if isinstance(value, set) else parts_of(value):
            yield from _tensors(part, seen)
