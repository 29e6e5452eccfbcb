"""Distillation from the float network: what the last layers put out is held against what they put out before."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import Node
from torch.nn import functional as F

from hawq_lightning._types import Outputs as ModelOutputs
from hawq_lightning.quantization._class_axis import class_axis
from hawq_lightning.sensitivity import Outputs, find_boundary

_TINY = 1e-12


@dataclass(frozen=True)
class Head:
    """A last layer before the loss.

    Attributes:
        name: of the module.
        axis: of its output along which the loss takes a softmax; ``None``: it takes none.
    """

    name: str
    axis: int | None

    @property
    def distance(self) -> str:
        """``kl`` or ``mse``."""
        return "mse" if self.axis is None else "kl"


class GraphOutputs(Outputs):
    """As :class:`Outputs`, but keeps the outputs with their graph."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.tensors: list[torch.Tensor] = []
        self.versions: list[int] = []

    def __enter__(self) -> GraphOutputs:
        super().__enter__()
        return self

    def _visit(self, name: str, output: ModelOutputs) -> ModelOutputs:
        count = len(self.edges)
        out = super()._visit(name, output)
        if isinstance(out, torch.Tensor) and len(self.edges) > count:
            self.tensors.append(out)
            self.versions.append(out._version)
        return out


def _outputs_before(boundary: list[int], outputs: GraphOutputs) -> list[int]:
    """The outputs in front of loss modules that own parameters: a network gives no number without axes."""
    numbers = set(boundary)
    while losses := {i for i in numbers if outputs.tensors[i].ndim == 0 and outputs.behind(outputs.edges[i])}:
        numbers = (numbers - losses).union(*(outputs.behind(outputs.edges[i]) for i in losses))
    return sorted(numbers)


def find_heads(loss: torch.Tensor, outputs: GraphOutputs) -> list[Head]:
    """The last layers before ``loss``, in the order in which they ran, and what the loss makes of each.

    The graph of the loss is walked back to the first outputs of parametric layers; a softmax met on the way tells that
    an output holds logits.
    """
    boundary = _outputs_before(find_boundary(loss, outputs)[0], outputs)
    softmax = _softmax_behind(loss, {(outputs.edges[i].node, outputs.edges[i].output_nr): i for i in boundary})
    axes = {
        i: class_axis(loss, outputs.tensors[i], node) for i, node in softmax.items()
        if not outputs.tensors[i].is_complex()  # its sizes are no logits
    }  # fmt: skip
    heads: dict[str, Head] = {}
    for i in boundary:
        head = Head(outputs.names[i], axes.get(i))
        first = heads.setdefault(head.name, head)
        if first.axis != head.axis:
            heads[head.name] = Head(head.name, None)
    return list(heads.values())


def _softmax_behind(loss: torch.Tensor, ends: Mapping[tuple[Node, int], int]) -> dict[int, Node]:
    """Number of a boundary output -> the softmax between it and the loss."""
    softmaxes: dict[int, Node] = {}
    stack: list[tuple[Any, Any]] = [(loss.grad_fn, None)]
    visited = set()
    while stack:
        node, softmax = stack.pop()
        if node is None or (node, softmax) in visited:
            continue
        visited.add((node, softmax))
        if "SoftmaxBackward" in node.name():
            softmax = node
        for parent, nr in node.next_functions:
            if (parent, nr) in ends:
                if softmax is not None:
                    softmaxes[ends[parent, nr]] = softmax
            else:
                stack.append((parent, softmax))
    return softmaxes


class HeadOutputs:
    """Collects what heads put out, a list of tensors each, in the order of the calls.

    Args:
        model: hooks go on its modules while active.
        heads: which ones.
        enough: number of outputs after which :class:`Enough` ends the forward pass.
        copy: pass on copies, where the loss overwrites what it gets.
    """

    def __init__(self, model: nn.Module, heads: Sequence[Head], enough: int | None = None, copy: bool = False) -> None:
        self._model, self._heads, self._enough, self._copy = model, heads, enough, copy
        self.tensors: dict[str, list[torch.Tensor]] = {h.name: [] for h in heads}
        self._handles: list[Any] = []

    def __enter__(self) -> HeadOutputs:
        for head in self._heads:
            module = self._model.get_submodule(head.name)
            self._handles.append(module.register_forward_hook(self._hook(head.name)))
        return self

    def __exit__(self, *exc: object) -> None:
        for handle in self._handles:
            handle.remove()

    def count(self) -> int:
        """Outputs seen so far."""
        return sum(len(t) for t in self.tensors.values())

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[object, ...], ModelOutputs], ModelOutputs]:
        def record(module: nn.Module, args: tuple[object, ...], output: ModelOutputs) -> ModelOutputs:
            self.tensors[name] += list(_tensors(output))
            if self._enough is not None and self.count() >= self._enough:
                raise Enough
            return output.clone() if self._copy and isinstance(output, torch.Tensor) else None

        return record


class Enough(BaseException):
    """All outputs were seen; the loss that would follow is of no interest."""


def _tensors(output: ModelOutputs) -> Iterator[torch.Tensor]:
    if isinstance(output, torch.Tensor):
        yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from _tensors(value)
    elif isinstance(output, (list, tuple)):
        for value in output:
            yield from _tensors(value)


def _real(x: torch.Tensor) -> torch.Tensor:
    return (torch.view_as_real(x.resolve_conj()) if x.is_complex() else x).float()


def distance(
    heads: Sequence[Head],
    student: Mapping[str, Sequence[torch.Tensor]],
    teacher: Mapping[str, Sequence[torch.Tensor]],
    temperature: float = 1.0,
) -> torch.Tensor:
    """Mean over heads of how far the student is from the teacher.

    Logits that go into a softmax: T^2 KL(teacher || student) of the distributions at temperature T, the mean over
    positions (Hinton et al., 2015, section 2). Other outputs: the mean squared error over the teacher's variance, so
    that heads of other units weigh alike. Outputs of several calls (feature levels) count as one long one.

    Args:
        heads: from :func:`find_heads`.
        student: head -> outputs, with a graph.
        teacher: the same without them.
        temperature: T.

    Returns:
        Scalar, float32, 0 where student and teacher agree.
    """
    parts = []
    for head in heads:
        ours, theirs = student[head.name], teacher[head.name]
        if head.axis is None:
            error = torch.stack([(_real(s) - _real(t)).square().sum() for s, t in zip(ours, theirs)]).sum()
            values = torch.cat([_real(t).flatten() for t in theirs])
            parts.append(error / (values - values.mean()).square().sum().clamp_min(_TINY))
            continue
        total, positions = [], 0
        for s, t in zip(ours, theirs):
            p, q = (F.log_softmax(x.float() / temperature, head.axis) for x in (t, s))
            total.append(F.kl_div(q, p, log_target=True, reduction="sum"))
            positions += t.numel() // t.shape[head.axis]
        parts.append(temperature**2 * torch.stack(total).sum() / max(positions, 1))
    return torch.stack(parts).mean()
