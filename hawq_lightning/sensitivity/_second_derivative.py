"""Second derivatives of the loss that autograd does not have: how that shows, and what is said of it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch.autograd.graph import GradientEdge, Node
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from hawq_lightning._errors import HawqError
from hawq_lightning._loss_graph import walk
from hawq_lightning._types import FunctionInputs, Options

_NOT_IMPLEMENTED = re.compile(r"derivative for (?:aten::)?_*(\w+?)(?:_backward\w*)? is not implemented")
_ONCE = "@once_differentiable"
_HARD_SIGMOIDS = (F.hardsigmoid, torch._C._nn.hardsigmoid, torch._C._nn.hardsigmoid_)
_PLAIN = ("attention", "hardsigmoid")  # operators for which there are others that can be differentiated twice


class NoSecondDerivative(HawqError):
    """An operation on the way cannot be differentiated twice.

    Attributes:
        operation: in a few words.
    """

    def __init__(self, operation: str) -> None:
        super().__init__(
            f"The loss has no second derivative, since it goes through {operation}: measure with estimator='ggn', "
            "which takes differences of gradients there, or with another loss_fn, such as a smooth stand-in (callbacks "
            "take it as MeasureConfig(loss_fn=...))."
        )
        self.operation = operation

    @property
    def has_plain_form(self) -> bool:
        """Whether :func:`twice_differentiable` has another operator for it."""
        return any(name in self.operation for name in _PLAIN)


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
        raise NoSecondDerivative(name) from error


def check_twice_differentiable(loss: torch.Tensor, edges: Sequence[GradientEdge]) -> None:
    """Look for functions of the user's own whose gradient autograd takes for a constant, silently.

    Args:
        loss: scalar with a graph.
        edges: where to stop.

    Raises:
        NoSecondDerivative: there is one on the way; the message names it.
    """
    for function in own_functions(loss, edges):
        code = getattr(getattr(function, "backward", None), "__code__", None)
        if code is not None and code.co_qualname.startswith("once_differentiable."):
            raise NoSecondDerivative(f"{function.__name__}, whose backward is once_differentiable")


def own_functions(loss: torch.Tensor, edges: Sequence[GradientEdge]) -> list[type]:
    """Autograd functions on the way from the loss to ``edges`` that are neither torch's nor of this package."""
    found = (getattr(node, "_forward_cls", None) for node in nodes_between(loss, edges))
    return [f for f in found if f is not None and f.__module__.split(".")[0] not in ("torch", "hawq_lightning")]


def nodes_between(loss: torch.Tensor, edges: Sequence[GradientEdge]) -> list[Node]:
    """Nodes of the graph from the loss to ``edges``, without these."""
    ends = {e.node for e in edges}
    return [n for n in walk([loss.grad_fn], ends) if n not in ends]


@contextmanager
def twice_differentiable() -> Iterator[None]:
    """Inside, attention runs in plain operations, and so do hard sigmoids: their own kernels have one derivative."""
    with sdpa_kernel(SDPBackend.MATH), _HardSigmoids():
        yield


class _HardSigmoids(TorchFunctionMode):
    """Hard sigmoid by operations that can be differentiated twice, which PyTorch's cannot."""

    def __torch_function__(
        self, func: Callable[..., object], types: object, args: FunctionInputs = (), kwargs: Options | None = None
    ) -> object:
        kwargs = kwargs or {}
        if func in _HARD_SIGMOIDS:
            x = args[0] if args else kwargs["input"]
            y = F.relu6(x + 3) / 6
            in_place = func is torch._C._nn.hardsigmoid_ or kwargs.get("inplace") or (len(args) > 1 and args[1])
            return x.copy_(y) if in_place else y
        return func(*args, **kwargs)
