"""Which loss a step that optimizes by hand has: what it sends back for its parameters until something uses it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.overrides import TorchFunctionMode

from hawq_lightning._loss_graph import walk
from hawq_lightning._types import FunctionInputs, Options
from hawq_lightning.callbacks._trainer._namespaces import kinds


class LossCaptured(BaseException):
    """Carries the loss out of the step.

    Attributes:
        loss: scalar.
        read: the step has read gradients of parameters, which have none here, before it used them.
    """

    def __init__(self, loss: torch.Tensor, read: bool) -> None:
        self.loss, self.read = loss, read


class ManualBackward(TorchFunctionMode):
    """In the place of ``manual_backward`` and ``Tensor.backward``; active while the step runs.

    Gradients add up, and so do losses that are sent back one after the other (a critic's for real and for generated
    images, parts of a batch). A loss that goes back to inputs which need gradients (adversarial examples) is sent back
    to these alone. If the step then reads their ``grad``, that is what it was for, and it is none of the step's losses.

    Args:
        module: whose parameters are no inputs.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._parameters = {id(p) for p in module.parameters()}
        self._sent: list[tuple[torch.Tensor, list[torch.Tensor]]] = []
        self._read = False

    def __call__(self, loss: torch.Tensor, gradient: torch.Tensor | None = None, *args: object, **how: object) -> None:
        """Send ``loss`` back."""
        inputs = [x for x in _leaves(loss) if id(x) not in self._parameters]
        if inputs:
            torch.autograd.backward(loss, gradient, inputs=inputs, retain_graph=True)
        self._sent.append((loss if gradient is None else (loss * gradient.detach()).sum(), inputs))

    def settle(self) -> None:
        """Raise :class:`LossCaptured` if losses were sent back."""
        if self._sent:
            losses = [loss for loss, _ in self._sent]
            raise LossCaptured(
                losses[0] if len(losses) == 1 else torch.stack([x.sum() for x in losses]).sum(), self._read
            )

    def __torch_function__(
        self, func: Callable[..., object], types: object, args: FunctionInputs = (), kwargs: Options | None = None
    ) -> object:
        if func is torch.Tensor.backward:
            self(*args, **(kwargs or {}))
            return None
        if self._sent and func == _GRAD:
            self._sent = [(loss, inputs) for loss, inputs in self._sent if all(x is not args[0] for x in inputs)]
            self._read |= id(args[0]) in self._parameters
        return func(*args, **(kwargs or {}))


_GRAD = torch.Tensor.grad.__get__  # type: ignore[union-attr]
_NEXT = (
    "lr_schedulers",
    "toggle_optimizer",
    "untoggle_optimizer",
)  # what comes when an optimizer's losses are complete


@contextmanager
def manual_backward(module: nn.Module) -> Iterator[None]:
    """Inside, a step of ``module`` ends with :class:`LossCaptured` as soon as its loss is known, before any update.

    It is known when an optimizer steps or forgets its gradients, when another's turn comes, and at the end.
    """
    backward = ManualBackward(module)
    steps = {kind: kind.step for kind in kinds("core.optimizer.LightningOptimizer")}
    forget = torch.optim.Optimizer.zero_grad

    def update(_: object, closure: object = None, **how: object) -> None:
        if callable(closure):
            closure()
        backward.settle()

    def settled(run: Callable[..., object]) -> Callable[..., object]:
        def first(*args: object, **kwargs: object) -> object:
            backward.settle()
            return run(*args, **kwargs)

        return first

    unwrapped = register_optimizer_step_pre_hook(lambda _, args, how: update(_, *args, **how))
    try:
        module.__dict__["manual_backward"] = backward
        module.__dict__.update({name: settled(getattr(module, name)) for name in _NEXT})
        torch.optim.Optimizer.zero_grad = settled(forget)  # type: ignore[method-assign, assignment]
        for kind in steps:
            kind.step = update
        with backward:
            yield
        backward.settle()
    except Exception:  # a step that reads gradients of parameters, which have none here (SAM, clipping by hand)
        backward.settle()
        raise
    finally:
        unwrapped.remove()
        torch.optim.Optimizer.zero_grad = forget  # type: ignore[method-assign]
        for kind, step in steps.items():
            kind.step = step
        for name in ("manual_backward", *_NEXT):
            module.__dict__.pop(name, None)


def _leaves(loss: torch.Tensor) -> list[torch.Tensor]:
    """Leaves that need gradients, on the way back from a loss."""
    found = (getattr(node, "variable", None) for node in walk([loss.grad_fn]))
    return list({id(leaf): leaf for leaf in found if isinstance(leaf, torch.Tensor)}.values())
