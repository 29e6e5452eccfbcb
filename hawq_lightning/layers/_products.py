"""Products that a module makes inside of its call, shown to whoever asks.

For layers with more than one, and for those whose function shows none.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from hawq_lightning.layers._fake_quant import FakeQuantLayer, must_be_called
from hawq_lightning.layers._kind import LayerKind, Record
from hawq_lightning.layers._replaced import hide_forward, show_forward

Visit = Callable[[torch.Tensor], torch.Tensor]
Product = Callable[..., torch.Tensor]


class _Hook:
    """Attached to one weight of one module until it is removed; the first one changes the module's ``forward``."""

    def __init__(
        self, module: nn.Module, parameter: str, visit: Visit | None, record: Record | None,
        forward: Callable[..., object],
    ) -> None:  # fmt: skip
        self.module, self.parameter, self.visit, self.record = module, parameter, visit, record
        hooks = _HOOKS.setdefault(module, [])
        if not hooks:
            _CALLED[module] = module.register_forward_pre_hook(must_be_called)
            show_forward(module, forward)
        hooks.append(self)

    def remove(self) -> None:
        """Detach; after the last one the module is as it was."""
        hooks = _HOOKS.get(self.module, [])
        if self in hooks:
            hooks.remove(self)
            if not hooks:
                _CALLED.pop(self.module).remove()
                hide_forward(self.module)


_HOOKS: WeakKeyDictionary[nn.Module, list[_Hook]] = WeakKeyDictionary()
_CALLED: WeakKeyDictionary[nn.Module, RemovableHandle] = WeakKeyDictionary()


def visited(module: nn.Module, parameter: str, x: torch.Tensor) -> torch.Tensor:
    """What is read in the place of ``x``, after everybody who asked has seen it."""
    for hook in list(_HOOKS.get(module, ())):
        if hook.parameter == parameter and hook.visit is not None:
            x = hook.visit(x)
    return x


def recorded(module: nn.Module, parameter: str, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """What goes on in the place of the product ``y``, after everybody who asked has seen it."""
    for hook in list(_HOOKS.get(module, ())):
        if hook.parameter == parameter and hook.record is not None:
            replaced = hook.record(x, y)
            y = y if replaced is None else replaced
    return y


def is_recorded(module: nn.Module, parameter: str) -> bool:
    """Whether somebody has asked for the products with a weight."""
    return any(h.parameter == parameter and h.record is not None for h in _HOOKS.get(module, ()))


def shown_product(
    module: nn.Module, parameter: str, product: Product, x: torch.Tensor, weight: torch.Tensor, *rest: object
) -> torch.Tensor:
    """``product(x, weight, *rest)``, both operands and the result in sight; of a fake-quant layer they are quantized.

    Args:
        module: that multiplies.
        parameter: the weight's name in it.
        product: such as ``F.linear``.
        x: what the weight is multiplied with.
        weight: the float weight.
        rest: further arguments of ``product``.
    """
    x = visited(module, parameter, x)
    if isinstance(module, FakeQuantLayer):
        y = module.quantized_product(product, x, weight, *rest, parameter=parameter)
    else:
        y = product(x, weight, *rest)
    return recorded(module, parameter, x, y)


class InnerProductsKind(LayerKind):
    """A kind whose products are not calls of the module itself.

    :meth:`explicit_forward` makes them one by one, and shows each by :func:`visited` and :func:`recorded`.
    """

    def explicit_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> object:
        """As the module's ``forward``; it runs while somebody has asked for products."""
        raise NotImplementedError

    def on_read(self, module: nn.Module, parameter: str, visit: Visit) -> Any:
        """See :meth:`LayerKind.on_read`."""
        return self._attach(module, parameter, visit, None)

    def on_call(self, module: nn.Module, parameter: str, record: Record) -> Any:
        """See :meth:`LayerKind.on_call`."""
        return self._attach(module, parameter, None, record)

    def _attach(self, module: nn.Module, parameter: str, visit: Visit | None, record: Record | None) -> _Hook:
        def forward(*args: Any, **kwargs: Any) -> object:
            return self.explicit_forward(module, *args, **kwargs)

        return _Hook(module, parameter, visit, record, forward)
