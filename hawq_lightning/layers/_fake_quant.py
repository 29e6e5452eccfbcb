"""What fake-quant layers share: a quantizer for each weight, one for what is read, and the product of the two.

A fake-quant layer is made in place: the same object, Parameters and names, another class. Swapping ``__class__`` keeps
aliases, hooks, Python lists, tied weights, pickling and deepcopy intact, which replacing the module does not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar, cast

import torch
from torch import nn

from hawq_lightning._errors import HawqError
from hawq_lightning._types import Options, StateDict
from hawq_lightning.layers._held import HeldQuantizers
from hawq_lightning.layers._recompute import Recomputable, recompute_in_backward

WeightQ = TypeVar("WeightQ", bound=nn.Module)
ActivationQ = TypeVar("ActivationQ", bound=nn.Module)


class FakeQuantLayer(nn.Module, Generic[WeightQ, ActivationQ]):
    """Base of the fake-quant classes, each of which inherits from the float layer's class as well.

    Attributes:
        float_type: the layer type that it stands in for.
        weight_quantizer: of the parameter ``weight``; other parameters have ``<parameter>_quantizer``.
        input_quantizer: of what ``weight`` is multiplied with; other parameters have ``<parameter>_input_quantizer``.
        quantizer_options: keywords that the quantizers were made with.
    """

    float_type: type[nn.Module]
    weight_quantizer: WeightQ
    input_quantizer: ActivationQ
    weight: torch.Tensor
    quantizer_options: Options

    def __setstate__(self, state: StateDict) -> None:
        """Layers that were pickled by an earlier version lack some things."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self.__dict__.setdefault("quantizer_options", {})
        if must_be_called not in self._forward_pre_hooks.values():
            self.register_forward_pre_hook(must_be_called)

    def __prepare_scriptable__(self) -> object:
        """Asked by ``torch.jit.script``.

        Raises:
            HawqError: quantizers cannot be compiled from their source.
        """
        raise HawqError(
            "torch.jit.script cannot compile a quantized network: use torch.jit.trace(model, example), torch.export or "
            "hawq_lightning.export."
        )

    @property
    def quantized_weight(self) -> torch.Tensor:
        """The weight as the forward pass uses it."""
        return self.weight_quantizer(self.weight)  # type: ignore[no-any-return]

    def quantized_product(
        self,
        product: Callable[..., torch.Tensor],
        input: torch.Tensor,
        weight: torch.Tensor,
        *rest: object,
        parameter: str = "weight",
    ) -> torch.Tensor:
        """``product(Q(input), Q(weight), *rest)``, keeping for the backward pass what the operands were made of.

        Args:
            product: such as ``F.linear``.
            input: what the weight is multiplied with.
            weight: the float parameter.
            rest: further arguments of ``product``.
            parameter: the weight's name in the layer.
        """
        of_input = getattr(self, input_quantizer_attribute(parameter))
        of_weight = getattr(self, quantizer_attribute(parameter))
        x, w = of_input(input), of_weight(weight)
        with recompute_in_backward(
            (x, input, cast(Recomputable, of_input)), (w, weight, cast(Recomputable, of_weight))
        ):
            return product(x, w, *rest)


def quantizer_attribute(parameter: str) -> str:
    """The name under which a fake-quant layer has a parameter's quantizer: ``weight`` -> ``weight_quantizer``."""
    return f"{parameter.replace('.', '_')}_quantizer"


def input_quantizer_attribute(parameter: str) -> str:
    """The same for what it is multiplied with: ``weight`` -> ``input_quantizer``, ``up`` -> ``up_input_quantizer``."""
    return "input_quantizer" if parameter == "weight" else f"{parameter.replace('.', '_')}_input_quantizer"


def quantizers_by_attribute(layer: nn.Module) -> dict[str, nn.Module]:
    """What a fake-quant layer holds as its quantizers, or what else holds some; nothing of other modules."""
    if isinstance(layer, HeldQuantizers):
        return {name: child for name, child in layer._modules.items() if child is not None}
    held = layer._modules.items() if isinstance(layer, FakeQuantLayer) else ()
    return {name: child for name, child in held if child is not None and name.endswith("_quantizer")}


def quantizer_parts(model: nn.Module) -> set[nn.Module]:
    """The quantizers of all fake-quant layers of a model, with the modules in them."""
    return {m for layer in model.modules() for q in quantizers_by_attribute(layer).values() for m in q.modules()}


def must_be_called(module: nn.Module, args: object) -> None:
    """A hook that does nothing: a module that has one is called, not read past, as fused Transformer layers do."""


def layer_type(module: nn.Module) -> type[nn.Module]:
    """The module's type; for a fake-quant layer the type that it stands in for."""
    return getattr(type(module), "float_type", type(module))
