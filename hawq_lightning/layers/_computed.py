"""Weights that are no parameters: a parametrization or a hook computes them from others."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from hawq_lightning.layers._adopted import fake_quant_class, is_parametrized
from hawq_lightning.layers._fake_quant import FakeQuantLayer
from hawq_lightning.layers._hooked import bake_hooks


def parametrized_class(module: nn.Module) -> type[nn.Module] | None:
    """The class that ``torch.nn.utils.parametrize`` made for this module alone; ``None``: it made none."""
    return next((t for t in type(module).__mro__ if is_parametrized(t)), None)


def put_computed(holder: nn.Module, name: str, weight: torch.Tensor) -> Callable[[], None]:
    """Put another tensor in the place of a weight that is computed; a hook computes it anew before the next call.

    Args:
        holder: of the weight.
        name: of it there.
        weight: what the next call reads.

    Returns:
        puts back what was there.
    """
    made = parametrized_class(holder)
    before = None if made is None else made.__dict__.get(name)
    if made is None or not isinstance(before, property):
        value = getattr(holder, name)
        setattr(holder, name, weight)
        return lambda: setattr(holder, name, value)
    compute = before.fget
    assert compute is not None
    # copies of the module have its class
    setattr(made, name, property(lambda module: weight if module is holder else compute(module), before.fset))
    return lambda: setattr(made, name, before)


def bake_parametrizations(module: nn.Module) -> None:
    """Make parameters of what a module's parametrizations and hooks compute now, in place; others stay as they are."""
    bake_hooks(module)
    made = parametrized_class(module)
    if made is None:
        return
    values = {n: getattr(module, n).detach() for n in module._modules["parametrizations"]._modules}  # type: ignore[union-attr]
    (plain,) = made.__bases__
    quantized = isinstance(module, FakeQuantLayer)
    module.__class__ = fake_quant_class(plain, type(module).__bases__[0]) if quantized else plain
    del module._modules["parametrizations"]
    for name, value in values.items():
        setattr(module, name, nn.Parameter(value))
