"""The loss's last stretch: from the outputs of the last parametric layers, the *boundary*, to the loss.

Found in the loss's autograd graph, so any loss works. The Hessian of that stretch times a vector comes from double
backward through it alone; the network behind it is never differentiated twice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

Key = tuple[Any, int]


class Cut(torch.autograd.Function):
    """Identity whose gradient can be blocked: where the loss reads an inner feature as well as what follows it."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, blocked: dict[str, bool]) -> torch.Tensor:
        """Copy, so that in-place operations may follow."""
        ctx.blocked = blocked
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[torch.Tensor | None, None]:
        """Pass the gradient on, or stop it."""
        return (None if ctx.blocked["on"] else grads[0]), None


class Outputs:
    """Records the outputs of every module that owns parameters, as edges of the autograd graph.

    Edges are taken in forward hooks, so they survive in-place operations on the outputs.

    Args:
        model: hooks go on its modules while active.
        cut: numbers of the outputs to pass through :class:`Cut`.
    """

    def __init__(self, model: nn.Module, cut: frozenset[int] = frozenset()) -> None:
        self._model, self._cut = model, cut
        self._handles: list[Any] = []
        self.blocked = {"on": False}
        self.edges: list[GradientEdge] = []
        self.values: list[torch.Tensor] = []
        self.names: list[str] = []

    def __enter__(self) -> Outputs:
        for name, module in self._model.named_modules():
            if next(module.parameters(recurse=False), None) is not None:
                self._handles.append(module.register_forward_hook(self._hook(name)))
        return self

    def __exit__(self, *exc: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _hook(self, name: str) -> Any:
        def record(module: nn.Module, args: Any, output: Any) -> Any:
            return self._visit(name, output)

        return record

    def _visit(self, name: str, output: Any) -> Any:
        if isinstance(output, torch.Tensor):
            if not output.requires_grad:
                return output
            if len(self.edges) in self._cut:
                output = Cut.apply(output, self.blocked)
            self.edges.append(get_gradient_edge(output))
            self.values.append(output.detach())
            self.names.append(name)
            return output
        if isinstance(output, Mapping):
            for key, value in output.items():
                new = self._visit(name, value)
                if new is not value:
                    output[key] = new  # type: ignore[index]
            return output
        if isinstance(output, (list, tuple)):
            new = [self._visit(name, value) for value in output]
            if all(a is b for a, b in zip(new, output)):
                return output
            return type(output)(*new) if hasattr(output, "_fields") else type(output)(new)
        return output


def find_boundary(loss: torch.Tensor, edges: Sequence[GradientEdge]) -> tuple[list[int], bool, list[torch.Tensor]]:
    """Walk back from the loss to the first recorded outputs.

    Returns:
        numbers of the outputs on the boundary, in order; whether one of them also feeds another (then gradients of
        the loss are totals and :class:`Cut` is needed); parameters that the loss reads directly.
    """
    number: dict[Key, int] = {}
    for i, edge in enumerate(edges):
        number.setdefault((edge.node, edge.output_nr), i)  # an outer module's output is its last layer's
    own = get_gradient_edge(loss)
    number.pop((own.node, own.output_nr), None)
    found: dict[int, Any] = {}
    direct: list[torch.Tensor] = []

    def walk(start: Any, into: dict[int, Any]) -> None:
        stack, visited = [start], set()
        while stack:
            node = stack.pop()
            if node is None or node in visited:
                continue
            visited.add(node)
            if hasattr(node, "variable") and start is own.node:
                direct.append(node.variable)
            for parent, nr in node.next_functions:
                if parent is None:
                    continue
                hit = number.get((parent, nr))
                if hit is not None:
                    into[hit] = parent
                else:
                    stack.append(parent)

    walk(own.node, found)
    below: dict[int, Any] = {}
    seen: set[int] = set()
    frontier = list(found.items())
    while frontier:  # everything upstream of the boundary, one recorded output at a time
        i, node = frontier.pop()
        if i in seen:
            continue
        seen.add(i)
        step: dict[int, Any] = {}
        walk(node, step)
        below |= step
        frontier += step.items()
    return sorted(found), bool(set(found) & set(below)), direct


class OutputHessian:
    """The Hessian of the loss with respect to the boundary, as an operator on lists of tensors.

    Args:
        loss: scalar.
        outputs: the recorder of the forward pass.
        boundary: numbers from :func:`find_boundary`.
    """

    def __init__(self, loss: torch.Tensor, outputs: Outputs, boundary: Sequence[int]) -> None:
        self._outputs = outputs
        self.edges = [outputs.edges[i] for i in boundary]
        self.values = [outputs.values[i] for i in boundary]
        self.names = [outputs.names[i] for i in boundary]
        outputs.values.clear()  # of inner layers: the graph keeps what it needs
        outputs.blocked["on"] = True
        try:
            found = torch.autograd.grad(loss, self.edges, create_graph=True, retain_graph=True, allow_unused=True)
        finally:
            outputs.blocked["on"] = False
        self.gradient = [g if g is not None else torch.zeros_like(v) for g, v in zip(found, self.values)]
        self.linear = not any(g.requires_grad for g in self.gradient)

    def __call__(self, vectors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """H v."""
        curved = [(g, v.to(g.dtype)) for g, v in zip(self.gradient, vectors) if g.requires_grad]
        if not curved:
            return [torch.zeros_like(v) for v in self.values]
        self._outputs.blocked["on"] = True
        try:
            found = torch.autograd.grad(
                [g for g, _ in curved], self.edges, [v for _, v in curved], retain_graph=True, allow_unused=True
            )
        finally:
            self._outputs.blocked["on"] = False
        return [h if h is not None else torch.zeros_like(v) for h, v in zip(found, self.values)]

    def backward(self, vectors: Sequence[torch.Tensor], last: bool = False) -> None:
        """Send ``vectors`` back through the network; the graph stays for the next probe unless this is the last."""
        torch.autograd.backward(self.edges, list(vectors), retain_graph=not last)
