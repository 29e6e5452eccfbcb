"""The loss's last stretch: from the outputs of the last parametric layers, the *boundary*, to the loss.

Found in the loss's autograd graph, so any loss works. The Hessian of that stretch times a vector comes from double
backward through it alone; the network behind it is never differentiated twice.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import GradientEdge, Node
from torch.utils.hooks import RemovableHandle

from hawq_lightning._batches import plain_tensor
from hawq_lightning._loss_graph import edge_of
from hawq_lightning._types import AutogradContext
from hawq_lightning._types import Outputs as ModelOutputs
from hawq_lightning.layers import find_kind
from hawq_lightning.sensitivity._heap import release_memory
from hawq_lightning.sensitivity._second_derivative import check_twice_differentiable, told_in_one_sentence
from hawq_lightning.sensitivity._views import without_base

Key = tuple[Node, int]
_LARGE = 1 << 20  # output elements


def wide(x: torch.Tensor) -> torch.Tensor:
    """In float32 at least: factors of bfloat16 outputs need more digits than the outputs have."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class GradientStop(torch.autograd.Function):
    """Identity whose gradient can be blocked: where the loss reads an inner feature as well as what follows it."""

    @staticmethod
    def forward(ctx: AutogradContext, x: torch.Tensor, blocked: dict[str, bool]) -> torch.Tensor:
        """Copy, so that in-place operations may follow."""
        ctx.blocked = blocked
        return x.clone()

    @staticmethod
    def backward(ctx: AutogradContext, *grads: Any) -> tuple[torch.Tensor | None, None]:
        """Pass the gradient on, or stop it."""
        return (None if ctx.blocked["on"] else grads[0]), None


class Outputs:
    """Records the outputs of every module that owns parameters, as edges of the autograd graph.

    Edges are taken in forward hooks, and outputs that are views are copied, so they survive in-place operations. Values
    are let go of as soon as another recorded output follows from them: only those of the boundary serve.

    Args:
        model: hooks go on its modules while active.
        cut: numbers of the outputs to pass through :class:`GradientStop`.
        skip: modules that are not looked at, by name: they are parts of the loss.
    """

    def __init__(self, model: nn.Module, cut: frozenset[int] = frozenset(), skip: Collection[str] = ()) -> None:
        self._model, self._cut, self._skip = model, cut, skip
        self._handles: list[RemovableHandle] = []
        self.blocked = {"on": False}
        self.edges: list[GradientEdge] = []
        self.values: list[torch.Tensor | None] = []
        self.names: list[str] = []
        self.visits: list[int] = []  # how many tensors of any kind came before, which no recording changes
        self._visited = 0
        self.inner: set[int] = set()  # outputs that another one follows from
        self.recording = True
        self._number: dict[Key, int] = {}

    def __enter__(self) -> Outputs:
        for name, module in self._model.named_modules():
            if name in self._skip or isinstance(module, torch.jit.ScriptModule):  # which takes no hooks
                continue
            if next(module.parameters(recurse=False), None) is not None:
                # before the user's hooks, which may keep what they see for the loss
                self._handles.append(module.register_forward_hook(self._hook(name), prepend=True))
        return self

    def __exit__(self, *exc: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _hook(self, name: str) -> Callable[[nn.Module, object, ModelOutputs], ModelOutputs]:
        def record(module: nn.Module, args: object, output: ModelOutputs) -> ModelOutputs:
            return self._visit(name, output)

        return record

    def is_layer(self, name: str) -> bool:
        """Whether a module is of PyTorch's or of a class that a kind knows, and so no part of the loss."""
        module = self._model.get_submodule(name)
        kind = find_kind(module)
        return type(module).__module__.startswith("torch.nn.") or (kind is not None and not kind.by_contents)

    def behind(self, edge: GradientEdge, variables: list[torch.Tensor] | None = None) -> set[int]:
        """Numbers of the recorded outputs that this one follows from directly.

        Args:
            edge: where to start.
            variables: gets the leaves on the way.
        """
        numbers: set[int] = set()
        stack: list[Node | None] = [edge.node]
        visited: set[Node] = set()
        while stack:
            node = stack.pop()
            if node is None or node in visited:
                continue
            visited.add(node)
            if variables is not None and hasattr(node, "variable"):
                variables.append(node.variable)
            for parent, nr in node.next_functions:
                if parent is None:
                    continue
                hit = self._number.get((parent, nr))
                if hit is None:
                    stack.append(parent)
                else:
                    numbers.add(hit)
        return numbers

    def _visit(self, name: str, output: ModelOutputs) -> ModelOutputs:
        if isinstance(output, torch.Tensor):
            if not self.recording:
                return output  # activation checkpointing runs the forward pass again
            self._visited += 1
            if output.is_complex():  # the loss is real: its curvature is that of real and imaginary parts
                return torch.view_as_complex(
                    self._visit_tensor(name, torch.view_as_real(output.resolve_conj()), self._visited)
                )
            return self._visit_tensor(name, output, self._visited)
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

    def _visit_tensor(self, name: str, output: torch.Tensor, visit: int) -> torch.Tensor:
        if output.requires_grad:
            cut = len(self.edges) in self._cut
            output = GradientStop.apply(output, self.blocked) if cut else without_base(output)
            edge = edge_of(output)
            # an outer module's output is its last layer's
            self._number.setdefault((edge.node, edge.output_nr), len(self.edges))
            behind = self.behind(edge)
            self.inner |= behind
            for i in behind - self._cut:
                self.values[i] = None
            self.edges.append(edge)
            self.values.append(plain_tensor(output.detach()))
            self.names.append(name)
            self.visits.append(visit)
        return output


class ReplacedOutputs(Outputs):
    """A forward pass in which some outputs are other tensors: the loss as a function of them.

    Args:
        model: hooks go on its modules while active.
        skip: modules that are not looked at.
        values: of the outputs, by their number among ``visits``.
    """

    def __init__(self, model: nn.Module, skip: Collection[str], values: Mapping[int, torch.Tensor]) -> None:
        super().__init__(model, skip=skip)
        self._new = values

    def _visit_tensor(self, name: str, output: torch.Tensor, visit: int) -> torch.Tensor:
        return self._new[visit].clone() if visit in self._new else output


def find_boundary(loss: torch.Tensor, outputs: Outputs) -> tuple[list[int], bool]:
    """Walk back from the loss to the first recorded outputs.

    Returns:
        numbers of the outputs on the boundary, in order; whether one of them also feeds another (then gradients of
        the loss are totals and :class:`GradientStop` is needed).
    """
    boundary = outputs.behind(edge_of(loss))
    return sorted(boundary), bool(boundary & outputs.inner)


def read_by(loss: torch.Tensor, outputs: Outputs) -> list[torch.Tensor]:
    """Parameters that the loss reads directly."""
    parameters: list[torch.Tensor] = []
    outputs.behind(edge_of(loss), parameters)
    return parameters


class OutputHessian:
    """The Hessian of the loss with respect to the boundary, as an operator on lists of tensors of at least float32.

    Args:
        loss: scalar.
        outputs: the recorder of the forward pass.
        boundary: numbers from :func:`find_boundary`.

    Raises:
        NoSecondDerivative: an operation between them says that it has none.
    """

    twice = True  # by autograd
    dense_outputs = 64  # outputs of a sample up to which the Hessian of an unknown loss is formed

    def __init__(self, loss: torch.Tensor, outputs: Outputs, boundary: Sequence[int]) -> None:
        self._outputs = outputs
        self.edges = [outputs.edges[i] for i in boundary]
        if self.twice:
            check_twice_differentiable(loss, self.edges)
        values = []
        for i in boundary:
            value = outputs.values[i]
            assert value is not None, outputs.names[i]  # let go of, though nothing follows from it
            values.append(value)
        self._dtypes = [v.dtype for v in values]
        self.values = [wide(v) for v in values]
        self.names = [outputs.names[i] for i in boundary]
        self.visits = [outputs.visits[i] for i in boundary]
        self.by_layer = [outputs.is_layer(n) for n in self.names]
        outputs.values.clear()
        outputs.recording = False
        self.rounding = max((torch.finfo(d).eps for d in self._dtypes), default=0.0)
        self.large = sum(v.numel() for v in self.values) > _LARGE
        self._tidy()
        outputs.blocked["on"] = True
        try:
            slopes = torch.autograd.grad(
                loss, self.edges, create_graph=self.twice, retain_graph=True, allow_unused=True
            )
        finally:
            outputs.blocked["on"] = False
        self._gradients = [g if g is not None else torch.zeros_like(v) for g, v in zip(slopes, values)]
        self.gradient = [wide(g.detach()) for g in self._gradients]
        self.linear = not any(g.requires_grad for g in self._gradients)
        self._tidy()

    def _tidy(self) -> None:
        """Where outputs are large, their loss is the peak of memory, and every step of it leaves the heap in holes."""
        if self.large:
            release_memory()

    def random_vectors(self, generator: torch.Generator) -> list[torch.Tensor]:
        """Normal vectors like the boundary's values, to try the Hessian on."""
        return [torch.randn(v.shape, generator=generator, dtype=torch.float32).to(v) for v in self.values]

    def linear_in(self, number: int) -> bool:
        """Whether the loss's slope along one tensor of the boundary is a constant."""
        return not self._gradients[number].requires_grad

    def __call__(self, vectors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """H v."""
        pairs = [(g, v.to(g.dtype)) for g, v in zip(self._gradients, vectors) if g.requires_grad]
        if not pairs:
            return [torch.zeros_like(v) for v in self.values]
        self._outputs.blocked["on"] = True
        try:
            with told_in_one_sentence():
                products = torch.autograd.grad(
                    [g for g, _ in pairs], self.edges, [v for _, v in pairs], retain_graph=True, allow_unused=True
                )
        finally:
            self._outputs.blocked["on"] = False
        self._tidy()
        return [wide(h) if h is not None else torch.zeros_like(v) for h, v in zip(products, self.values)]

    def free_graph(self) -> None:
        """Free the graph between the outputs and the loss; from now on there is :meth:`backward` alone."""
        self._gradients = []
        self._tidy()

    def backward(self, vectors: Sequence[torch.Tensor], last: bool = False) -> None:
        """Send ``vectors`` back through the network; the graph stays for the next probe unless this is the last."""
        torch.autograd.backward(self.edges, self.in_output_dtypes(vectors), retain_graph=not last)

    def in_output_dtypes(self, vectors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """In the precisions of the outputs."""
        return [v.to(dtype) for v, dtype in zip(vectors, self._dtypes)]
