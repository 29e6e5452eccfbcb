"""Which loss a step that optimizes by hand has: the first that it sends back for its parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import nn
from torch.overrides import TorchFunctionMode

from hawq_lightning._loss_graph import walk
from hawq_lightning._types import FunctionInputs, Options


class LossCaptured(BaseException):
    """Carries the loss out of the step."""

    def __init__(self, loss: torch.Tensor) -> None:
        self.loss = loss


class ManualBackward(TorchFunctionMode):
    """In the place of ``manual_backward`` and ``Tensor.backward``; active while the step runs.

    A loss that goes back to inputs which need gradients (adversarial examples) is sent back to these alone. If the step
    then reads their ``grad``, that is what it was for, and the next one is the loss.

    Args:
        module: whose parameters are no inputs.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._parameters = {id(p) for p in module.parameters()}
        self._waiting: torch.Tensor | None = None
        self._inputs: list[torch.Tensor] = []

    def __call__(self, loss: torch.Tensor, *args: object, **kwargs: object) -> None:
        """Send ``loss`` back.

        Raises:
            LossCaptured: it, or the one before, is the loss of the step.
        """
        self.settle()
        inputs = [x for x in _leaves(loss) if id(x) not in self._parameters]
        if not inputs:
            raise LossCaptured(loss)
        torch.autograd.backward(loss, inputs=inputs, retain_graph=True)
        self._waiting, self._inputs = loss, inputs

    def settle(self) -> None:
        """Raise :class:`LossCaptured` if a loss was sent back to inputs whose gradients nobody has read."""
        if self._waiting is not None:
            raise LossCaptured(self._waiting)

    def __torch_function__(
        self, func: Callable[..., object], types: object, args: FunctionInputs = (), kwargs: Options | None = None
    ) -> object:
        if func is torch.Tensor.backward:
            self(*args)
            return None
        if self._waiting is not None and func == _GRAD and any(args[0] is x for x in self._inputs):
            self._waiting, self._inputs = None, []
        return func(*args, **(kwargs or {}))


_GRAD = torch.Tensor.grad.__get__  # type: ignore[union-attr]


@contextmanager
def manual_backward(module: nn.Module) -> Iterator[None]:
    """Inside, a step of ``module`` ends with :class:`LossCaptured` as soon as its loss is known, before any update."""
    backward = ManualBackward(module)
    step = LightningOptimizer.step

    def update(*args: object, **kwargs: object) -> None:
        backward.settle()

    try:
        module.__dict__["manual_backward"] = backward
        LightningOptimizer.step = update  # type: ignore[method-assign]
        with backward:
            yield
        backward.settle()
    except Exception:  # a step that reads gradients of parameters, which have none here (SAM, clipping by hand)
        backward.settle()
        raise
    finally:
        LightningOptimizer.step = step  # type: ignore[method-assign]
        module.__dict__.pop("manual_backward", None)


def _leaves(loss: torch.Tensor) -> list[torch.Tensor]:
    """Leaves that need gradients, on the way back from a loss."""
    found = (getattr(node, "variable", None) for node in walk([loss.grad_fn]))
    return list({id(leaf): leaf for leaf in found if isinstance(leaf, torch.Tensor)}.values())
