"""``requires_grad`` of parameters while somebody's loss runs, for losses that need it themselves.

No parameter wants gradients in a measurement: backward passes then form no gradients of weights, which would take as
long again, and the memory of the network. Some losses differentiate by a parameter on their own, though (the adaptive
weight of a VQGAN, GradNorm, inner steps of MAML, penalties on the gradient), or ask which parameters are trained. The
former get the parameters as they are in training for as long as they run; the latter get the answer of training.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Self, TypeVar, cast

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from hawq_lightning._errors import HawqError
from hawq_lightning._loss_graph import trainable
from hawq_lightning._types import FunctionInputs, Options
from hawq_lightning.sensitivity._asking import asking_module

Result = TypeVar("Result")
_DIFFERENTIATED: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # by the parameters of which a loss takes gradients
_WANTS_GRADIENT = torch.Tensor.requires_grad.__get__  # type: ignore[attr-defined]
# whose questions are about the pass that runs: whether a fused kernel may be taken, what to switch off for a while
_NOT_THE_USERS = ("torch.", "hawq_lightning.", "lightning.", "pytorch_lightning.")


class ParametersNeeded(HawqError):
    """The loss takes gradients with respect to parameters, and this was not known: the pass is to be run again."""

    def __init__(self, name: str | None = None) -> None:
        what = "parameters" if name is None else f"the parameter {name!r}"
        super().__init__(
            f"The loss takes gradients with respect to {what}, in a pass in which no parameter has any: measure "
            "with the batch first that shows it, or give a loss_fn without that part (callbacks take it as "
            "MeasureConfig(loss_fn=...))."
        )


def again_if_needed(run: Callable[[], Result]) -> Result:
    """``run()``, once more where the loss turns out to take gradients with respect to parameters."""
    try:
        return run()
    except ParametersNeeded:
        return run()


class ParameterFlags(TorchFunctionMode):
    """Context of one call of a loss.

    Args:
        model: whose parameters want no gradients outside.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._model, self._trained = model, trainable(model)
        self._ids = {id(p) for p in model.parameters()}
        self._switched: list[nn.Parameter] = []

    def __enter__(self) -> Self:
        if self._model in _DIFFERENTIATED:
            self._switched = self._off()
            for p in self._switched:
                p.requires_grad_(True)
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        super().__exit__(kind, error, trace)  # type: ignore[no-untyped-call]
        for p in self._switched:
            p.requires_grad_(False)

    def __torch_function__(
        self, func: Callable[..., object], types: object, args: FunctionInputs = (), kwargs: Options | None = None
    ) -> object:
        kwargs = kwargs or {}
        if func == _WANTS_GRADIENT and id(args[0]) in self._ids and _is_users(asking_module()):
            return id(args[0]) in self._trained
        if func is torch.autograd.grad:
            self._check(args[1] if len(args) > 1 else kwargs.get("inputs"))
        return func(*args, **kwargs)

    def need_all(self) -> None:
        """Parameters are to want gradients in this loss from now on.

        Raises:
            ParametersNeeded: they did not.
        """
        if self._model not in _DIFFERENTIATED and self._off():
            _DIFFERENTIATED.add(self._model)
            raise ParametersNeeded

    def _check(self, inputs: object) -> None:
        asked = {id(x) for x in ([inputs] if isinstance(inputs, torch.Tensor) else cast(Iterable[object], inputs))}
        off = {id(p) for p in self._off()} & asked
        if off and self._model not in _DIFFERENTIATED:
            _DIFFERENTIATED.add(self._model)
            raise ParametersNeeded(next(n for n, p in self._model.named_parameters() if id(p) in off))

    def _off(self) -> list[nn.Parameter]:
        """Trained parameters that want no gradients at the moment."""
        return [p for p in self._model.parameters() if id(p) in self._trained and not p.requires_grad]


def _is_users(module: str) -> bool:
    """Whether a module is code of the user's own, or of a library of networks."""
    return bool(module) and not f"{module}.".startswith(_NOT_THE_USERS)
